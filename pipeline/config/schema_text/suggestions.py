"""Suggests the key of a job that a wrong word probably means."""

from __future__ import annotations

from pipeline.config.schema_text import describe
from pipeline.config.schema_text.describe import SchemaKey
from pipeline.config.schema_text.synonyms import names_meant
from pipeline.suggest import closest, did_you_mean

_TYPO = 0.8  # likeness from which a word is a typing error of a key


def remedy(word: str, section: SchemaKey) -> str:
    """What to write instead of ``word``, which is no key of ``section``."""
    if word == "base" and "recipe" in section.keys:
        return "did you mean 'recipe'?"
    # 1. A typing error of a key here.
    if closest(word, section.keys, _TYPO):
        return did_you_mean(word, section.keys, "keys here")
    # 2. What another tool calls a key of this section: `path` for the root of a dataset.
    names = names_meant(word)
    if here := [name for name in names if name in section.keys]:
        return ask(here)
    # 3. A key in the wrong section, else what another tool calls a key of any section.
    elsewhere = [shown(key) for key in describe.all_keys() if key.path[-1] == word]
    if elsewhere:
        return f"it belongs to {' or '.join(elsewhere)}"
    if meant := [shown(key) for key in describe.all_keys() if key.path[-1] in names]:
        return ask(meant)
    # 4. Anything similar.
    return did_you_mean(word, section.keys, "keys here")


def keys_meant(word: str) -> list[str]:
    """Keys that other tools call ``word``, as `explain` takes them; [] if the word is not known.

    A key of one section has its whole path (cluster.processes), one of several its name (base_lr).
    """
    keys: list[str] = []
    for name in names_meant(word):
        places = [key for key in describe.all_keys() if key.path[-1] == name]
        keys += [name] if len(places) > 1 else [shown(key) for key in places]
    return keys


def means_dataset_key(word: str) -> bool:
    """True if a word is a key of a dataset, or what another tool calls one: no dataset's name."""
    dataset = describe.find(("data", describe.ANY))
    keys = dataset.keys if dataset is not None else []
    return describe.is_dataset_key(word) or bool(set(names_meant(word)) & set(keys))


def shown(key: SchemaKey) -> str:
    """A key as a user writes it: a single dataset needs no name (data.root)."""
    return ".".join(part for part in key.path if part != describe.ANY)


def ask(keys: list[str]) -> str:
    """Example: "did you mean 'betas', 'eps' or 'weight_decay'?"."""
    *others, last = (f"'{key}'" for key in keys)
    first = f"{', '.join(others)} or " if others else ""
    return f"did you mean {first}{last}?"
