"""A sheet of images: equal squares in rows and columns, with titles, row labels and captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from pipeline.data.decode import Image

Color = tuple[int, int, int]  # RGB

# The layout, in pixels.
MIN_SIDE = 128  # of an image on the sheet
MAX_SIDE = 192
GAP = 10  # between images
CAPTION_HEIGHT = 18  # of one line below an image
LABEL_WIDTH = 190  # labels of the rows, left of the images
HEADER_HEIGHT = 62  # title and column titles

BACKGROUND: Color = (250, 250, 248)
BLACK: Color = (20, 20, 20)
GREY: Color = (120, 120, 120)
GREEN: Color = (20, 120, 50)
RED: Color = (190, 30, 30)


@dataclass(frozen=True)
class RowLabel:
    """Text beside a row: a name in large print, then smaller lines."""

    name: str
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Caption:
    """Text below an image. The first line has the colour, the others are grey."""

    lines: Sequence[str]
    color: Color = GREY


class Sheet:
    """The drawing: a grid of squares with row labels to the left and column titles above.

    Args:
        side: of each square (pixels), see `side_of`.
        label_width: pixels left of the images; 0 for a sheet without row labels.
        caption_lines: lines of text that fit below each image.
    """

    def __init__(
        self,
        *,
        rows: int,
        columns: int,
        side: int,
        label_width: int = LABEL_WIDTH,
        caption_lines: int = 1,
    ) -> None:
        self.side = side
        self._columns = columns
        self._left = label_width or GAP
        self._row_height = side + caption_lines * CAPTION_HEIGHT + GAP
        width = self._left + columns * (side + GAP) + (GAP if label_width else 0)
        height = HEADER_HEIGHT + rows * self._row_height
        self.image = Pillow.new("RGB", (width, height), BACKGROUND)
        self._draw = ImageDraw.Draw(self.image)

    def pixels(self) -> Image:
        """The sheet: uint8, shape (height, width, 3)."""
        return np.asarray(self.image)

    def title(self, text: str) -> None:
        self._text(text, (GAP, GAP), 15, BLACK, width=self.image.width - 2 * GAP)

    def labels(self, labels: Sequence[RowLabel]) -> None:
        width = self._left - 2 * GAP
        for row, label in enumerate(labels):
            y = self._top(row)
            for line in textwrap.wrap(label.name, 21)[:3]:
                self._text(line, (GAP, y), 16, BLACK, width=width)
                y += 20
            for line in label.details:
                self._text(line, (GAP, y), 12, GREY, width=width)
                y += 16

    def column(
        self,
        number: int,
        title: str,
        images: Sequence[Image],
        captions: Sequence[Caption] = (),
    ) -> None:
        """Draw a column from above; ``images``: uint8, shape (side, side, 3) each."""
        x = self._left + number * (self.side + GAP)
        self._text(title, (x, HEADER_HEIGHT - 24), 13, GREY, width=self.side)
        for row, image in enumerate(images):
            self.image.paste(Pillow.fromarray(image), (x, self._top(row)))
        for row, caption in enumerate(captions):
            y = self._top(row) + self.side + 3
            color = caption.color
            for line in caption.lines:
                self._text(line, (x, y), 11, color, width=self.side)
                y += CAPTION_HEIGHT - 3
                color = GREY

    def tiles(self, images: Sequence[Image], captions: Sequence[Caption]) -> None:
        """Draw images row by row, where neither rows nor columns have a meaning."""
        for column in range(self._columns):
            every = slice(column, None, self._columns)
            self.column(column, "", images[every], captions[every])

    def _top(self, row: int) -> int:
        return HEADER_HEIGHT + row * self._row_height

    def _text(
        self, text: str, corner: tuple[int, int], size: int, color: Color, *, width: int
    ) -> None:
        """Draw one line, shortened with "..." if it is wider than ``width``."""
        font = ImageFont.load_default(size)
        shown = text
        while shown and self._draw.textlength(shown, font) > width:
            text = text[:-1]
            shown = f"{text.rstrip()} ..."
        self._draw.text(corner, shown, color, font)


def side_of(image_size: int) -> int:
    """Side of the squares for images of ``image_size`` pixels."""
    # Enlarge small images by a whole number, so that each of their pixels is a square.
    # Example: 32 pixels become 4 * 32 = 128; 96 become 192, and 224 shrink to 192.
    return min(image_size * -(-MIN_SIDE // image_size), MAX_SIDE)


def scaled(image: Image, side: int) -> Image:
    """Resize a square image."""
    method = cv2.INTER_NEAREST if side >= image.shape[0] else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (side, side), interpolation=method), np.uint8)


def fitted(image: Image, side: int) -> Image:
    """Resize the whole image to fit into a square, and centre it."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    fitted_width = max(1, round(width * scale))
    fitted_height = max(1, round(height * scale))
    method = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    resized = cv2.resize(image, (fitted_width, fitted_height), interpolation=method)
    square = np.full((side, side, 3), BACKGROUND, np.uint8)
    top = (side - fitted_height) // 2
    left = (side - fitted_width) // 2
    square[top : top + fitted_height, left : left + fitted_width] = resized
    return square


def png(image: Image) -> bytes:
    """Encode an image as PNG."""
    out = io.BytesIO()
    Pillow.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()
