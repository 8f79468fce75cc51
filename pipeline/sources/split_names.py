"""Recognises splits by the usual names of folders, tars and Hugging Face splits.

A name is compared word by word, without case. One word has to name the split; the others have to be
words that say nothing about the content, or to occur in the name of another split as well:

    Training, train2017, seg_train, training_set, train_images      train
    imagenet21k_val, ValidationSet, dev, eval, hold-out             validation
    flowers_train beside flowers_test                               train and test
    bullet_train beside steam_engine                                none: "bullet" has a meaning
    imagenet21k_small_classes                                       no split
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from pipeline.sources.names import class_of_tar
from pipeline.sources.units import SplitName

# Of the names of one split that exist, the one whose word comes first is used.
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "dev", "eval", "evaluation", "holdout")
TEST_NAMES = ("test", "testing", "tests")
_WORDS: dict[str, SplitName] = {
    **dict.fromkeys(TRAIN_NAMES, "train"),
    **dict.fromkeys(VALIDATION_NAMES, "validation"),
    **dict.fromkeys(TEST_NAMES, "test"),
}
_ORDER = {word: number for number, word in enumerate(_WORDS)}
_USUAL = """
set sets split splits data dataset datasets folder folders dir subset part class classes image
images img imgs photo photos pic pics picture pictures jpg jpeg png small full raw original resized
cropped processed clean final labeled labelled seg cls loc imagenet imagenet1k imagenet21k
imagenet22k imagenet100 ilsvrc ilsvrc2012 tiny mini
"""
_WITHOUT_MEANING = frozenset(_USUAL.split())


class SplitLike(NamedTuple):
    """A name with a word for a split. ``others``: its other words."""

    split: SplitName
    word: str
    others: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """True if the name means nothing but the split."""
        return all(word in _WITHOUT_MEANING or word.isdigit() for word in self.others)


def means_nothing(name: str) -> bool:
    """True for names of containers, such as "images" or "data"."""
    return name.lower() in _WITHOUT_MEANING


def split_like(name: str) -> SplitLike | None:
    """The split in a name; None if no word, or more than one, names a split."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", class_of_tar(name))
    lower = re.sub(r"h[eo]ld[-_ ]*out", "holdout", spaced.lower())
    # "train2017" and "trainset" are two words, "imagenet21k" is one.
    glued = rf"\b_*({'|'.join(_WORDS)})(set|\d+)(?=\b|_)"
    words = re.findall(r"[^\W_]+", re.sub(glued, r" \1 \2", lower))
    named = [word for word in words if word in _WORDS]
    if len(named) != 1:
        return None
    others = tuple(word for word in words if word != named[0])
    return SplitLike(_WORDS[named[0]], named[0], others)


def usual_splits(present: Collection[str]) -> dict[SplitName, str]:
    """The name of each split among ``present``, in the order train, validation, test."""
    likes = {name: like for name in present if (like := split_like(name)) is not None}
    splits_by_others: dict[tuple[str, ...], set[SplitName]] = {}
    for like in likes.values():
        splits_by_others.setdefault(like.others, set()).add(like.split)
    # Plain names first, so that "train" wins over "train_images".
    candidates = sorted(
        (
            (not like.is_plain, len(like.others), _ORDER[like.word], name)
            for name, like in likes.items()
            if like.is_plain or len(splits_by_others[like.others]) > 1
        )
    )
    splits: dict[SplitName, str] = {}
    for *_, name in candidates:
        splits.setdefault(likes[name].split, name)
    return {split: splits[split] for split in dict.fromkeys(_WORDS.values()) if split in splits}
