"""Labels of images that lie together in one folder or archive, in a file of their own.

imagenet_2012_validation_synset_labels.txt  line i: WordNet ID of the i-th image
LOC_val_solution.csv                        the same by name, as on Kaggle
val_annotations.txt                         the same by name, of Tiny ImageNet
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Mapping, Sequence

from pipeline.errors import DataError
from pipeline.sources.remote import Storage

SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"
KAGGLE_LABELS = "LOC_val_solution.csv"
TINY_LABELS = "val_annotations.txt"
FILES = (SYNSET_LABELS, KAGGLE_LABELS, TINY_LABELS)
# Kaggle's archive of ImageNet has its labels three folders above train/ and val/.
_KAGGLE_FOLDER = "ILSVRC/Data/CLS-LOC"


def labels_file(storage: Storage, root: str, folder: str = "") -> str | None:
    """The path of the file with the labels; None if there is none.

    Looked for in the folder of the split, and in the root of the source.
    """
    places = [folder, root] if folder else [root]
    if root.endswith(_KAGGLE_FOLDER):
        places.append(root.removesuffix(_KAGGLE_FOLDER).rstrip("/"))
    paths = [f"{place}/{name}" for place in places for name in FILES]
    return next((path for path in paths if storage.info(path)), None)


def labels_of(
    storage: Storage, path: str, stems: Sequence[str], label_of: Mapping[str, int]
) -> list[int]:
    """The class index of each image.

    Args:
        path: of the file with the labels.
        stems: names of the images without ending.
        label_of: class index by class ID.

    Raises:
        DataError: an image has no label, or one that is no class of the dataset.
    """
    ids = _read(storage.read(path).decode(), posixpath.basename(path), stems)
    missing = [stem for stem in stems if stem not in ids]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(stems)} validation images have no label ({missing[0]})",
            place=storage.shown(path),
            remedy="the file needs one line for each image",
        )
    unknown = sorted({ids[stem] for stem in stems} - set(label_of))
    if unknown:
        raise DataError(
            f"{len(unknown)} of its classes are not among those of the dataset: "
            f"{', '.join(unknown[:5])}",
            place=storage.shown(path),
            remedy="correct the file, or `classes`",
        )
    return [label_of[ids[stem]] for stem in stems]


def _read(text: str, name: str, stems: Sequence[str]) -> dict[str, str]:
    """Class ID by the stem of an image's name."""
    if name == KAGGLE_LABELS:
        # PredictionString is "n01440764 12 5 210 180": the class, then boxes.
        rows = csv.DictReader(io.StringIO(text))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    if name == TINY_LABELS:
        # val_0.JPEG  n01443537  0  0  63  63: file, class, box
        lines = [line.split() for line in text.splitlines() if line.strip()]
        return {words[0].partition(".")[0]: words[1] for words in lines if len(words) > 1}
    # Line i belongs to the image with the i-th name, wherever that image lies in an archive. With a
    # line too few or too many, it is unknown which image a line belongs to, so no line is used.
    ids = text.split()
    return dict(zip(sorted(stems), ids, strict=True)) if len(ids) == len(stems) else {}
