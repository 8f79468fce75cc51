"""Which folder, or which split of a Hugging Face dataset, becomes which split.

The key ``splits`` of a dataset decides; without it, the usual names do (``split_names``):

    in the source          becomes
    train, val             train and validation
    train, val, test       train, validation and test
    train, test            train and validation: test stands in for the missing validation split
    train                  one whole: images are held out by content
    val, test, no others   validation, test: can be evaluated only
    cat, dog, bird         one whole
    cat, dog, test         unclear: the user has to set ``splits`` (``unclear_splits``)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.errors import DataError
from pipeline.sources import unclear_splits
from pipeline.sources.layout import Entries
from pipeline.sources.remote import Storage
from pipeline.sources.source_config import SourceConfig, SplitNames, SplitsSetting
from pipeline.sources.split_names import usual_splits
from pipeline.sources.units import SplitName
from pipeline.suggest import did_you_mean


@dataclass(frozen=True)
class Division:
    """The name within the source of each split; {"": ""} if the source is one whole.

    ``stand_in``: the test split that serves as the missing validation split. ``unused``: what is
    none of the splits.
    """

    splits: dict[SplitName, str]
    stand_in: str = ""
    unused: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What the user should know about it."""
        notes = []
        if self.stand_in:
            notes.append(
                f"the validation split is {self.stand_in}, as there is no other; "
                "for a test split of its own, set `splits`"
            )
        if self.unused:
            notes.append(f"not used, as they are none of the splits: {', '.join(self.unused)}")
        return notes


def named_splits(splits: SplitNames) -> dict[SplitName, str]:
    """The splits that the key ``splits`` names."""
    named: dict[SplitName, str] = {
        "train": splits.train,
        "validation": splits.validation,
        "test": splits.test,
    }
    return {split: name for split, name in named.items() if name}


def divide(setting: SplitsSetting, present: Collection[str]) -> Division:
    """What a source is divided into.

    Args:
        setting: the key ``splits`` of the dataset.
        present: names of what may be a split or a class: folders and class tars, or the splits of a
            Hugging Face dataset.
    """
    if setting is None:
        return _divide_by_usual_names(present)
    if isinstance(setting, str):
        return Division({"": ""})
    return Division(_with_held_out_validation(named_splits(setting)) or {"": ""})


def _divide_by_usual_names(present: Collection[str]) -> Division:
    splits = usual_splits(present)
    if "train" not in splits and set(present) - set(splits.values()):
        return Division({"": ""})
    if splits.keys() == {"train", "test"}:
        both: dict[SplitName, str] = {"train": splits["train"], "validation": splits["test"]}
        return Division(both, stand_in=splits["test"])
    return Division(_with_held_out_validation(splits) or {"": ""})


def _with_held_out_validation(splits: Mapping[SplitName, str]) -> dict[SplitName, str]:
    """Training images without a validation split are divided by content: the split ""."""
    if "train" in splits and "validation" not in splits:
        return {"" if split == "train" else split: name for split, name in splits.items()}
    return dict(splits)


def folders(config: SourceConfig, storage: Storage, root: str, entries: Entries) -> Division:
    """As ``divide``, with the paths of the folders.

    Args:
        entries: of the root: folders and class tars.

    Raises:
        DataError: a folder that `splits` names does not exist; the remedy names the closest one.
            Without that key: it is unclear which folders are splits.
    """
    unknown = next(unknown_folders(config, storage, root), None)
    if unknown is not None:
        split, name, remedy = unknown
        cause = f"there is no folder {name}, which is to be the {split} split"
        raise DataError(cause, place=config.root, remedy=remedy)
    division = divide(config.splits, list(entries))
    if config.splits is None:
        unclear_splits.require_clear(storage, root, entries, division.splits)
    paths = {
        split: root if name in ("", ".") else f"{root}/{name.strip('/')}"
        for split, name in division.splits.items()
    }
    used = {name.strip("/").partition("/")[0] for name in division.splits.values()}
    unused = sorted(set(entries) - used) if not used & {"", "."} else []
    return replace(division, splits=paths, unused=unused)


def unknown_folders(
    config: SourceConfig, storage: Storage, root: str
) -> Iterator[tuple[SplitName, str, str]]:
    """(split, folder, remedy) for every folder of the key `splits` that does not exist."""
    if config.splits is None or isinstance(config.splits, str):
        return
    for split, name in named_splits(config.splits).items():
        if name == "." or storage.is_folder(f"{root}/{name.strip('/')}"):
            continue
        # Compare with the folders beside it: of "images/tarin", with those in images/.
        above = name.strip("/").rpartition("/")[0]
        if above and not storage.is_folder(f"{root}/{above}"):
            above = ""
        inside = f"{root}/{above}" if above else root
        siblings = [
            entry["name"].rstrip("/").removeprefix(root).lstrip("/")
            for entry in storage.entries(inside)
            if entry["type"] == "directory"
        ]
        yield split, name, did_you_mean(name, siblings, "folders of the source")


def require_known(config: SourceConfig, present: Collection[str]) -> None:
    """Raise DataError for a name in the key `splits` that the dataset does not have."""
    if config.splits is None:
        return
    if isinstance(config.splits, str):
        raise DataError(
            "`splits: none` is for folders and tars of classes; this dataset has splits by name",
            place=config.root,
            remedy=f"name them: splits: {{train: one of {', '.join(present)}}}",
        )
    for split, name in named_splits(config.splits).items():
        if name not in present:
            raise DataError(
                f"there is no split {name}, which is to be the {split} split",
                place=config.root,
                remedy=did_you_mean(name, present, "splits of the dataset"),
            )
