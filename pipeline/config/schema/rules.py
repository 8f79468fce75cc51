"""The rules of a key, written beside the key itself.

    log_every_steps: Annotated[PositiveInt, Rules(changes=NOTHING, rehearse=fixed(1))]

Other modules read the rules and keep no list of keys of their own: ``resume_diff`` (which results
does the value change?), the trainer (is it a hyperparameter in TensorBoard?), ``smoke_test`` (how
does ``--rehearse`` shrink it?). Pydantic ignores the metadata, so it never appears in the JSON
Schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config.schema.section import Section
from pipeline.config.schema.shrink import Shrink

NOTHING: tuple[str, ...] = ()  # for ``changes``: how a stage runs, what it checks, logs and saves
TRAINING_RESULTS = ("pretrain", "finetune")  # for ``changes``: only what is learned


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may happen to a key's value apart from the user setting it.

    Attributes:
        changes: the stages whose result depends on the value. A finished stage is kept and an
            interrupted one resumes if only other keys have changed. None: as the section around
            the key. A new key therefore counts as one that changes results until someone decides
            otherwise; tests/config/test_key_rules.py lists the decision for every key.
        keeps_work: an unfinished preparation continues if only such keys (or keys that change no
            result) have changed; a key of another kind makes the units read so far useless.
        accepts_missing: a stage that a version without the key has started is kept, whatever the
            key says now: a shipped job may set a new key, and must not discard finished work.
        hparam: column of the key in TensorBoard's table of hyperparameters, from 1; 0: not shown.
        rehearse: makes the value of a rehearsal from the job's own.
        rehearse_input: the same, for keys that describe input files (images, weights). A rehearsal
            has no such files, so these keys are replaced before the job is checked; the others
            are replaced after it, so that the check still sees the real sizes.
    """

    changes: tuple[str, ...] | None = None
    keeps_work: bool = False
    accepts_missing: bool = False
    hparam: int = 0
    rehearse: Shrink | None = None
    rehearse_input: Shrink | None = None


_NO_RULES = Rules()  # most keys: they count as their section does, a rehearsal keeps them


def _rules_of(info: FieldInfo) -> Rules:
    return next((entry for entry in info.metadata if isinstance(entry, Rules)), _NO_RULES)


def key_of(name: str, info: FieldInfo) -> str:
    """The key as the job file spells it: ``from`` for the field ``initial``."""
    return info.alias or name


def changes_result(root: type[Section], path: Sequence[str], stage: str) -> bool:
    """True if the result of ``stage`` depends on the key at ``path``.

    The innermost rule decides. Example for ("model", "drop_path"): Job.model says that all stages
    after preparation depend on the section, and ModelConfig.drop_path that only training does.
    """
    decided = [rules.changes for rules in _rules_along(root, path) if rules.changes is not None]
    return not decided or stage in decided[-1]


def keeps_work(root: type[Section], path: Sequence[str]) -> bool:
    """True if an unfinished preparation can use its units after the key at ``path`` has changed."""
    return any(rules.keeps_work for rules in _rules_along(root, path))


def accepts_missing(root: type[Section], path: Sequence[str]) -> bool:
    """True if a stage that was started without the key at ``path`` is kept."""
    return any(rules.accepts_missing for rules in _rules_along(root, path))


def keys_that_keep_work(section: type[Section]) -> list[str]:
    """The keys of a section that have this rule."""
    return [name for name, info in section.model_fields.items() if _rules_of(info).keeps_work]


def hparam_keys(section: type[Section]) -> list[str]:
    """The hyperparameters of a section that TensorBoard shows, in the order of its columns."""
    # Sorted by column and not by position in the class: TensorBoard's table puts the values first
    # that people compare most.
    columns = {name: _rules_of(info).hparam for name, info in section.model_fields.items()}
    shown = [name for name, column in columns.items() if column]
    return sorted(shown, key=lambda name: columns[name])


def keys_with_rules(section: Section, above: str = "") -> Iterator[tuple[str, Rules]]:
    """Every key that a checked section has, in dotted form, with its rules; outer keys first."""
    for name, info in type(section).model_fields.items():
        key = f"{above}{key_of(name, info)}"
        yield key, _rules_of(info)
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from keys_with_rules(value, f"{key}.")
        elif isinstance(value, dict):  # datasets by name
            for entry, below in value.items():
                yield from keys_with_rules(below, f"{key}.{entry}.")


def _rules_along(root: type[Section], path: Sequence[str]) -> Iterator[Rules]:
    """Rules of the keys on the way to ``path``, outermost first.

    Example: ("data", "toy", "root") -> rules of Job.data, then of DatasetConfig.root; "toy" is a
    name that the user chose and has no rules.
    """
    section: type[Section] | None = root
    parts = iter(path)
    for part in parts:
        fields = section.model_fields if section is not None else {}
        info = next((info for name, info in fields.items() if key_of(name, info) == part), None)
        if info is None:
            return
        yield _rules_of(info)
        # A mapping by name: the next part of the path is a name and not a key of the schema.
        if named_section(info):
            next(parts, None)
        section = section_within(info.annotation)


def named_section(info: FieldInfo) -> bool:
    """True for a key that holds sections by a name that the user chose: the job's ``data``."""
    return get_origin(info.annotation) is dict


def section_within(annotation: object) -> type[Section] | None:
    """The section class inside a type: DatasetConfig of dict[str, DatasetConfig]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (section_within(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)
