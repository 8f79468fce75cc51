"""Made-up photographs of things that do not exist: classes that can be learned, by no single cue and never perfectly.

What a class looks like is a function of its WordNet ID alone; an image, of (seed, class, split, number). Each class has
its outline, colours, markings, pattern, number of things and surroundings; each image takes most of them from its class and
some from chance, among clutter, shadow, blur, noise and a light of its own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.decode import Image
from pipeline.data.hashing import key_of

Floats = NDArray[np.float32]
Random = np.random.Generator

FAITH = 0.97  # probability that an image takes a cue from its class
LESS_FAITH = {
    "body": 0.85,
    "marking": 0.85,
    "ground": 0.5,
}  # the same of colours, which would tell too much
OUTLINE_POINTS = 96
SMALLEST_SCALE, LARGEST_SCALE = 0.75, 1.2  # of one thing, relative to its class's usual size
SUBPIXEL = 4  # bits of a polygon's coordinates behind the point
NOISE_SIDE = 512


@dataclass(frozen=True)
class Look:
    """The cues of a class. Angles in turns, colours as (hue, saturation, value) in [0, 1]."""

    outline: tuple[
        float, float, float, float
    ]  # lobes, their depth, their sharpness, height / width
    body: tuple[float, float, float]
    marking: tuple[float, float, float]  # colour of pattern and mark
    pattern: tuple[
        int, float, float
    ]  # 0 plain, 1 stripes, 2 checks, 3 dots, 4 rings; periods across a thing; angle
    mark: tuple[
        int, float
    ]  # corners of the mark in the middle (0: none), its size relative to the thing
    count: int  # usual number of things
    upright: bool  # things stand as they should, give or take, or lie any way round
    ground: tuple[float, float, float]  # colour of the far end of the background
    slope: float  # direction in which the background changes
    grain: tuple[float, float]  # waves of the background across the image, their angle


CUES = tuple(field.name for field in fields(Look))


@functools.lru_cache(maxsize=4096)
def look_of(wnid: str) -> Look:
    """What a class looks like: a function of its WordNet ID."""
    return _random_look(np.random.default_rng(key_of("look", wnid)))


def picture(seed: int, wnid: str, split: str, number: int, sizes: tuple[int, int]) -> Image:
    """An image of a class: uint8, shape (height, width, 3), RGB, both sides within ``sizes`` (pixels).

    A pure function of its arguments; two that differ in any of them differ.
    """
    random = np.random.default_rng(key_of("picture", seed, wnid, split, number))
    height, width = _shape(random, *sizes)
    look, other = look_of(wnid), _random_look(random)
    mixed = Look(
        *(
            getattr(look if random.random() < LESS_FAITH.get(cue, FAITH) else other, cue)
            for cue in CUES
        )
    )
    canvas = _background(random, mixed, height, width)
    side = min(height, width)
    for _ in range(random.integers(0, 3)):
        _draw(random, canvas, _random_look(random), side * random.uniform(0.07, 0.16))
    count = max(1, mixed.count + int(random.integers(-1, 2)))
    for x, y in _places(random, count):
        size = side * random.uniform(SMALLEST_SCALE, LARGEST_SCALE) * 0.46 / count**0.4
        _draw(random, canvas, mixed, size, (x * width, y * height))
    for _ in range(random.integers(0, 3)):
        _draw(random, canvas, _random_look(random), side * random.uniform(0.05, 0.12))
    return _photograph(random, canvas)


def _random_look(random: Random) -> Look:
    """A look from a vocabulary that all classes share: each word of it tells little, several together tell the class."""

    def word(*words: float) -> float:
        return words[int(random.random() * len(words))]

    def colour(
        saturation: tuple[float, float], value: tuple[float, float]
    ) -> tuple[float, float, float]:
        return word(0.02, 0.16, 0.42, 0.68), word(*saturation), word(*value)

    return Look(
        outline=(word(0, 2, 3, 4, 5, 7), word(0.22, 0.4), word(0.1, 0.9), word(0.5, 0.75, 1.0)),
        body=colour((0.5, 0.85), (0.5, 0.85)),
        marking=colour((0.25, 0.8), (0.25, 0.9)),
        pattern=(int(word(0, 1, 2, 3, 4)), word(2.4, 4.8), word(0.0, 0.25, 0.5, 0.75)),
        mark=(int(word(0, 0, 3, 4, 5, 32)), word(0.3, 0.45)),
        count=int(word(1, 1, 2, 3, 5)),
        upright=bool(word(0, 1, 1)),
        ground=colour((0.15, 0.5), (0.3, 0.75)),
        slope=word(0.0, 0.25, 0.5, 0.75),
        grain=(word(3.0, 7.0, 14.0), word(0.0, 0.25, 0.5, 0.75)),
    )


def _shape(random: Random, least: int, most: int) -> tuple[int, int]:
    """(height, width) in pixels: the longer side log-uniform, the ratio of the sides 1 to 1.6 as far as ``least`` lets it."""
    long = round(math.exp(random.uniform(math.log(least), math.log(most))))
    short = max(least, round(long / random.uniform(1.0, 1.6)))
    return (short, long) if random.random() < 0.6 else (long, short)


def _rgb(random: Random, colour: tuple[float, float, float], spread: float = 1.0) -> Floats:
    """RGB in [0, 1], shape (3, 1, 1), of a colour that strays from the given one, the hue by 0.03 turns in the mean square."""
    h, s, v = colour
    jitter = random.standard_normal(3).tolist()
    h = (h + 0.03 * spread * jitter[0]) % 1.0 * 6.0
    s = min(max(s + 0.12 * spread * jitter[1], 0.0), 1.0)
    v = min(max(v + 0.13 * spread * jitter[2], 0.05), 1.0)
    red, green, blue = (
        v - v * s * max(0.0, min(k, 4.0 - k, 1.0)) for k in ((n + h) % 6.0 for n in (5, 3, 1))
    )
    return np.array([[[red]], [[green]], [[blue]]], np.float32)


@functools.lru_cache(maxsize=1)
def _noise() -> Floats:
    """A tile of white noise, standard normal: shape (3, NOISE_SIDE, NOISE_SIDE)."""
    tile: Floats = np.random.default_rng(0).standard_normal(
        (3, NOISE_SIDE, NOISE_SIDE), dtype=np.float32
    )
    return tile


def _grain(random: Random, height: int, width: int) -> Floats:
    """White noise of an image's size, cut from the tile (repeated where the image is large) at a random place."""
    rows, columns = -(-height // NOISE_SIDE), -(-width // NOISE_SIDE)
    tile = _noise() if rows == columns == 1 else np.tile(_noise(), (1, rows, columns))
    top = int(random.integers(rows * NOISE_SIDE - height + 1))
    left = int(random.integers(columns * NOISE_SIDE - width + 1))
    return tile[:, top : top + height, left : left + width]


def _clouds(random: Random, height: int, width: int) -> Floats:
    """Smooth noise with less of the finer: shape (height, width), about standard normal."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.8), (7, 0.45), (19, 0.25)):
        coarse = random.standard_normal((cells, cells), dtype=np.float32) * np.float32(weight)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def _background(random: Random, look: Look, height: int, width: int) -> Floats:
    """Two colours that run into each other, clouds, and waves of the class's grain: shape (3, height, width), about [0, 1]."""
    y, x = _grid(height, width, (height / 2.0, width / 2.0), (height, width))
    turn = 2.0 * math.pi * (look.slope + 0.06 * random.standard_normal())
    clouds, swell = _clouds(random, height, width), _clouds(random, height, width)
    ramp = np.clip(0.5 + x * math.cos(turn) + y * math.sin(turn) + 0.25 * clouds, 0.0, 1.0)
    far = _rgb(random, look.ground, 2.0)
    near = _rgb(random, (random.random(), 0.1 + 0.4 * random.random(), 0.2 + 0.6 * random.random()))
    turn = math.pi * (look.grain[1] + 0.05 * random.standard_normal())
    waves = look.grain[0] * math.exp(0.15 * random.standard_normal()) * 2.0 * math.pi
    strength = random.uniform(0.08, 0.22)
    shade = (
        1.0
        + strength * np.sin((x * math.cos(turn) + y * math.sin(turn)) * waves + 1.6 * swell)
        + 0.1 * clouds
    )
    return np.asarray((near + (far - near) * ramp) * shade, np.float32)


def _places(random: Random, count: int) -> list[tuple[float, float]]:
    """Centres of things, as shares of the width and height: the best spread of a few random tries, so that they part."""
    places = random.uniform(0.2, 0.8, (4, count, 2))
    if count == 1:
        return [(float(places[0, 0, 0]), float(places[0, 0, 1]))]
    gaps = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1) + 2.0 * np.eye(count)
    best = places[int(gaps.min(axis=(1, 2)).argmax())]
    return [(float(x), float(y)) for x, y in best]


def _outline(look: Look) -> Floats:
    """A closed curve about the origin, its farthest point at distance 1: shape (OUTLINE_POINTS, 2)."""
    lobes, depth, sharpness, flatness = look.outline
    angle = np.arange(OUTLINE_POINTS, dtype=np.float32) * np.float32(2.0 * math.pi / OUTLINE_POINTS)
    wave = np.cos(lobes * angle)
    spiky = 1.0 - 2.0 * np.abs(np.arcsin(np.sin(lobes * angle / 2.0))) / np.float32(math.pi / 2.0)
    radius = 1.0 + (depth * ((1.0 - sharpness) * wave + sharpness * spiky) if lobes else 0.0 * wave)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle) * flatness], axis=1)
    return np.asarray(points / np.abs(points).max(), dtype=np.float32)


def _polygon(corners: int, size: float) -> Floats:
    angle = np.arange(corners, dtype=np.float32) * np.float32(2.0 * math.pi / corners)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.float32(size)


def _draw(
    random: Random,
    canvas: Floats,
    look: Look,
    size: float,
    centre: tuple[float, float] | None = None,
) -> None:
    """Paint one thing of a radius of ``size`` pixels at (x, y), or anywhere: its shadow, body, pattern, mark and shading."""
    height, width = canvas.shape[1:]
    across, down = centre or (random.uniform(0, width), random.uniform(0, height))
    reach = math.ceil(size * 1.25) + 1
    left, top = max(round(across) - reach, 0), max(round(down) - reach, 0)
    patch = canvas[:, top : round(down) + reach, left : round(across) + reach]
    rows, columns = shape = patch.shape[1:]
    middle = np.array([across - left, down - top], np.float32)
    turn = 2.0 * math.pi * (0.05 * random.standard_normal() if look.upright else random.random())
    cos, sin, squeeze = (
        math.cos(turn),
        math.sin(turn),
        random.uniform(0.75, 1.0),
    )  # seen from somewhat aside
    turned = np.array([[cos, sin], [-sin * squeeze, cos * squeeze]], np.float32) * np.float32(size)
    outline = _outline(look) @ turned + middle
    mask, shadow = _filled(shape, outline), _filled(shape, outline + np.float32(0.15 * size))
    patch *= 1.0 - 0.45 * cv2.blur(shadow, (3, 3))
    y, x = _grid(rows, columns, (down - top, across - left), (size, size))
    body, marking = _rgb(random, look.body), _rgb(random, look.marking)
    painted = body + (marking - body) * _pattern(random, look, x * cos - y * sin, x * sin + y * cos)
    if look.mark[0]:
        painted += (marking - painted) * _filled(shape, _polygon(*look.mark) @ turned + middle)
    painted *= 1.08 - 0.35 * (x * x + y * y) - 0.3 * (0.7 * x + y)
    patch += (painted - patch) * mask


def _grid(
    height: int, width: int, centre: tuple[float, float], unit: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Coordinates (y, x) of an image's rows and columns from a centre, in units of so many pixels: (height, 1), (width,)."""
    y = (np.arange(height, dtype=np.float32)[:, None] - np.float32(centre[0])) / np.float32(unit[0])
    x = (np.arange(width, dtype=np.float32) - np.float32(centre[1])) / np.float32(unit[1])
    return y, x


def _filled(shape: tuple[int, ...], points: Floats) -> Floats:
    """Coverage of each pixel by a polygon, in [0, 1]."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(
        mask, [np.rint(points * (1 << SUBPIXEL)).astype(np.int32)], 255, cv2.LINE_AA, SUBPIXEL
    )
    return mask * np.float32(1.0 / 255.0)


def _pattern(random: Random, look: Look, u: Floats, v: Floats) -> Floats:
    """Strength of the second colour, in [0, 1], at coordinates relative to the thing."""
    kind, periods, angle = look.pattern
    if kind == 0:
        return np.zeros_like(u)
    turn = math.pi * (angle + 0.03 * random.standard_normal())
    waves = math.pi * periods * math.exp(0.1 * random.standard_normal())
    along, across = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
    start = random.uniform(0, 2 * math.pi)
    if kind == 4:
        wave = np.cos(np.sqrt(u * u + v * v) * waves + start)
    elif kind == 1:
        wave = np.sin(along * waves + start)
    else:
        first, second = np.sin(along * waves + start), np.sin(across * waves)
        wave = first * second * 2.0 if kind == 2 else first + second - 0.7
    return np.clip(0.5 + 2.5 * wave, 0.0, 1.0)


def _photograph(random: Random, canvas: Floats) -> Image:
    """Light, its colour and falling off, focus and the sensor's noise: (3, height, width) -> uint8 (height, width, 3)."""
    height, width = canvas.shape[1:]
    y, x = _grid(height, width, (height / 2.0, width / 2.0), (height / 2.0, width / 2.0))
    turn, tilt = random.uniform(0, 2 * math.pi), random.uniform(0.0, 0.25)
    light = (
        1.0
        + tilt * (x * math.cos(turn) + y * math.sin(turn))
        - random.uniform(0.0, 0.15) * (x * x + y * y)
    )
    tint = np.exp(random.normal(0.0, 0.07, 3) + random.normal(0.0, 0.16)).astype(np.float32)[
        :, None, None
    ]
    canvas *= light * tint
    if (sigma := random.uniform(-0.4, 0.8) * math.sqrt(height * width) / 96.0) > 0.2:
        for plane in canvas:
            cv2.GaussianBlur(plane, (0, 0), sigma, dst=plane)
    contrast, noise = random.uniform(0.75, 1.1), random.uniform(0.005, 0.035)
    canvas = (
        (canvas - 0.5) * np.float32(contrast)
        + 0.5
        + _grain(random, height, width) * np.float32(noise)
    )
    pixels = (np.clip(canvas, 0.0, 1.0) * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
