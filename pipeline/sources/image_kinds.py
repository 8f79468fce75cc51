"""Tells the format of a file by its first bytes, whatever its ending."""

from __future__ import annotations

import functools

HEAD_BYTES = 32  # that ``image_kind`` looks at
INSTALL_HEIF = (
    'run "./launch.sh install heif" in a checkout, else pip install "revcol-pipeline[heif]"'
)
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\x1f\x8b": "GZIP",
}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


def image_kind(head: bytes) -> str:
    """The format that the first HEAD_BYTES of a file announce; '' if it is no image.

    "GZIP" stands for a compressed file, which may hold an image.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # The major brand, then those that the file is compatible with.
        if any(brand in head[8:] for brand in _AVIF_BRANDS):
            return "AVIF"
        return "HEIF" if any(brand in head[8:] for brand in _HEIF_BRANDS) else ""
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    return next((kind for start, kind in _STARTS.items() if head.startswith(start)), "")


@functools.cache
def can_read_heif() -> bool:
    """True if the package that decodes HEIC and HEIF is installed; Pillow then uses it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
