"""Names in a source folder: image files, class archives, and what belongs to neither.

Every module that looks into a source uses these rules. Two modules with rules of their own would
disagree about the same folder.

    train/n01440764.tar              class "n01440764"
    cat/photo.jpg, cat/photo         images: the content of a file decides, not its ending
    cat/photo.txt, cat/README.md     left out unless the content is an image
    cat/._photo.jpg, cat/Thumbs.db   left out: written by operating systems
    __MACOSX/, @eaDir/, .git/        left out, with all that is in them
"""

from __future__ import annotations

import os
import unicodedata

CLASS_TAR_SUFFIX = ".tar"
_IMAGES = """
.jpg .jpeg .jpe .jfif .png .apng .gif .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .ico .jp2 .j2k
.avif .heic .heif .hif
"""
# Endings of files that lie beside images and are none themselves.
_OTHERS = """
.txt .md .rst .json .jsonl .ndjson .xml .csv .tsv .html .htm .yaml .yml .db .ini .cfg .py .sh .pdf
.log .mat .npy .npz .pkl .pt .h5 .parquet .arrow .tar .mp4 .mov .avi .mkv .webm .doc .docx .url .lnk
.xmp .aae .cls .caption .info .bak .tmp .part .crdownload .lock .torrent .exe .svg .psd
"""
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
ARCHIVE_SUFFIXES = frozenset({".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"})
_OTHER_SUFFIXES = ARCHIVE_SUFFIXES | frozenset(_OTHERS.split())
_LITTER_FILES = frozenset({".ds_store", "thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"})
_LITTER_STEMS = ("readme", "license", "licence", "copying", "changelog", "makefile", "md5sum")
_RESOURCE_FORK = "._"  # macOS keeps a file's metadata in a second file with this prefix
# Folders of operating systems, network storages and notebooks, besides those with a leading dot.
_SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
    }
)


def is_image(name: str) -> bool:
    """True if a file name ends like an image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def may_be_image(path: str) -> bool:
    """True unless the path of a file, relative to its class, belongs to something else."""
    return not is_litter(path) and suffix_of(path) not in _OTHER_SUFFIXES


def suffix_of(name: str) -> str:
    """The ending of a file name in small letters: "a/b.JPG" -> ".jpg"."""
    return os.path.splitext(name)[1].lower()


def is_class_tar(name: str) -> bool:
    return name.lower().endswith(CLASS_TAR_SUFFIX)


def class_of_tar(name: str) -> str:
    """The class of a class tar: "n01440764.tar" -> "n01440764"."""
    return name[: -len(CLASS_TAR_SUFFIX)] if is_class_tar(name) else name


def class_name(name: str) -> str:
    """The ID of the class of a folder or tar.

    macOS writes accents as two characters (NFD), other systems as one (NFC): the same class.
    """
    return unicodedata.normalize("NFC", class_of_tar(name))


def is_hidden(name: str) -> bool:
    """True for entries that are never a class or a split: ".git", "._n01.tar", "__MACOSX"."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def is_litter(path: str) -> bool:
    """True for files of operating systems and for notes: ".DS_Store", "@eaDir/1.jpg", "README".

    Args:
        path: of the file, relative to the folder of its class or within its archive.
    """
    *folders, name = path.lower().split("/")
    if name in _LITTER_FILES or name.startswith((_RESOURCE_FORK, ".trashed-")):
        return True
    if any(folder not in ("", ".", "..") and is_hidden(folder) for folder in folders):
        return True
    return os.path.splitext(name)[0].rstrip("s") in _LITTER_STEMS and not is_image(name)
