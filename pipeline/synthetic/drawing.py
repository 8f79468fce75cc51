"""Draw synthetic images whose classes can be learned, by no single cue and never perfectly.

Why not noise or plain shapes: a first run should show a rising accuracy, and a broken augmentation
or loss should lower it.

The appearance of a class is a function of its WordNet ID alone. An image is a function of (seed,
class, split, number). Each class has its own outline, colours, markings, pattern, number of objects
and background. Each image takes most of these cues from its class and the rest at random; clutter,
shadow, blur, noise and lighting are random too.

One image, step by step:

    1. size and shape       longer side log-uniform: small and large images are equally common
    2. cues                 each from the class with probability 0.5 to 0.97, else at random
    3. background, clutter  up to two small objects of random appearance, behind
    4. objects              one to six of the class, spread over the image
    5. clutter              up to two small objects, in front
    6. photograph           lighting, tint, blur, contrast, sensor noise

Every random number comes from one generator, in a fixed order. Reordering two draws changes the
bytes of every image.
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.decode import Image
from pipeline.data.hashing import key_of
from pipeline.synthetic.appearance import (
    CHECKS,
    PLAIN,
    RINGS,
    STRIPES,
    Appearance,
    Colour,
    appearance_of,
    mixed_appearance,
    random_appearance,
)

Floats = NDArray[np.float32]
Random = np.random.Generator


OUTLINE_POINTS = 96
MIN_SCALE = 0.75  # size of one object, relative to the usual size of its class
MAX_SCALE = 1.2
SUBPIXEL_BITS = 4  # fractional bits of a polygon's coordinates
NOISE_SIDE = 512  # pixels


def draw_image(seed: int, wnid: str, split: str, number: int, sizes: tuple[int, int]) -> Image:
    """Draw an image of a class: uint8, shape (height, width, 3), RGB.

    A pure function of its arguments; images that differ in any argument differ. ``sizes``: least
    and largest side in pixels.
    """
    # "picture" is part of the seed: images stay the same when functions are renamed.
    random = np.random.default_rng(key_of("picture", seed, wnid, split, number))
    height, width = _random_shape(random, *sizes)
    appearance = mixed_appearance(random, appearance_of(wnid), random_appearance(random))
    canvas = _background(random, appearance, height, width)
    side = min(height, width)
    for _ in range(random.integers(0, 3)):
        _draw_object(random, canvas, random_appearance(random), side * random.uniform(0.07, 0.16))
    count = max(1, appearance.count + int(random.integers(-1, 2)))
    for x, y in _centres(random, count):
        # The more objects, the smaller each: 0.46 of the side for one, 0.24 for five.
        size = side * random.uniform(MIN_SCALE, MAX_SCALE) * 0.46 / count**0.4
        _draw_object(random, canvas, appearance, size, (x * width, y * height))
    for _ in range(random.integers(0, 3)):
        _draw_object(random, canvas, random_appearance(random), side * random.uniform(0.05, 0.12))
    return _photograph(random, canvas)


def _random_shape(random: Random, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) in pixels.

    The longer side is log-uniform. The ratio of the sides is 1 to 1.6, as far as ``shortest``
    allows.
    """
    long = round(math.exp(random.uniform(math.log(shortest), math.log(longest))))
    short = max(shortest, round(long / random.uniform(1.0, 1.6)))
    return (short, long) if random.random() < 0.6 else (long, short)


def _random_rgb(random: Random, colour: Colour, spread: float = 1.0) -> Floats:
    """A colour near the given one, as RGB in [0, 1]; shape (3, 1, 1).

    Standard deviations at ``spread`` 1: hue 0.03, saturation 0.12, value 0.13.
    """
    hue, saturation, value = colour
    jitter = random.standard_normal(3).tolist()
    h = (hue + 0.03 * spread * jitter[0]) % 1.0 * 6.0
    s = min(max(saturation + 0.12 * spread * jitter[1], 0.0), 1.0)
    v = min(max(value + 0.13 * spread * jitter[2], 0.05), 1.0)
    # HSV to RGB in closed form, with n = 5, 3, 1 for red, green and blue:
    # v - v s max(0, min(k, 4 - k, 1)) where k = (n + h) mod 6.
    red, green, blue = (
        v - v * s * max(0.0, min(k, 4.0 - k, 1.0)) for k in ((n + h) % 6.0 for n in (5, 3, 1))
    )
    return np.array([[[red]], [[green]], [[blue]]], np.float32)


@functools.lru_cache(maxsize=1)
def _noise_tile() -> Floats:
    """A tile of white noise, standard normal: shape (3, NOISE_SIDE, NOISE_SIDE)."""
    tile: Floats = np.random.default_rng(0).standard_normal(
        (3, NOISE_SIDE, NOISE_SIDE), dtype=np.float32
    )
    return tile


def _sensor_noise(random: Random, height: int, width: int) -> Floats:
    """White noise of an image's size.

    Cut from one tile at a random offset: faster than fresh noise per image.
    """
    rows = -(-height // NOISE_SIDE)
    columns = -(-width // NOISE_SIDE)
    tile = _noise_tile() if rows == columns == 1 else np.tile(_noise_tile(), (1, rows, columns))
    top = int(random.integers(rows * NOISE_SIDE - height + 1))
    left = int(random.integers(columns * NOISE_SIDE - width + 1))
    return tile[:, top : top + height, left : left + width]


def _clouds(random: Random, height: int, width: int) -> Floats:
    """Smooth noise: shape (height, width), about standard normal; coarse waves are stronger."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.8), (7, 0.45), (19, 0.25)):
        coarse = random.standard_normal((cells, cells), dtype=np.float32) * np.float32(weight)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def _background(random: Random, appearance: Appearance, height: int, width: int) -> Floats:
    """A gradient of two colours, clouds, and waves: shape (3, height, width), about [0, 1]."""
    y, x = _grid(height, width, (height / 2.0, width / 2.0), (height, width))
    angle = 2.0 * math.pi * (appearance.slope + 0.06 * random.standard_normal())
    clouds = _clouds(random, height, width)
    swell = _clouds(random, height, width)
    ramp = np.clip(0.5 + x * math.cos(angle) + y * math.sin(angle) + 0.25 * clouds, 0.0, 1.0)
    far = _random_rgb(random, appearance.ground, 2.0)
    near_colour = (random.random(), 0.1 + 0.4 * random.random(), 0.2 + 0.6 * random.random())
    near = _random_rgb(random, near_colour)
    angle = math.pi * (appearance.grain[1] + 0.05 * random.standard_normal())
    waves = appearance.grain[0] * math.exp(0.15 * random.standard_normal()) * 2.0 * math.pi
    strength = random.uniform(0.08, 0.22)
    shade = (
        1.0
        + strength * np.sin((x * math.cos(angle) + y * math.sin(angle)) * waves + 1.6 * swell)
        + 0.1 * clouds
    )
    return np.asarray((near + (far - near) * ramp) * shade, np.float32)


def _centres(random: Random, count: int) -> list[tuple[float, float]]:
    """Centres of objects relative to width and height: the most widely spaced of four tries."""
    tries = random.uniform(0.2, 0.8, (4, count, 2))
    if count == 1:
        return [(float(tries[0, 0, 0]), float(tries[0, 0, 1]))]
    # Distances between the centres of each try. A centre is at distance 0 from itself: the diagonal
    # must not count.
    distances = np.linalg.norm(tries[:, :, None] - tries[:, None], axis=-1) + 2.0 * np.eye(count)
    best = tries[int(distances.min(axis=(1, 2)).argmax())]
    return [(float(x), float(y)) for x, y in best]


def _outline(appearance: Appearance) -> Floats:
    """A closed curve around the origin, largest coordinate 1: shape (OUTLINE_POINTS, 2)."""
    lobes, depth, sharpness, flatness = appearance.outline
    angle = np.arange(OUTLINE_POINTS, dtype=np.float32) * np.float32(2.0 * math.pi / OUTLINE_POINTS)
    # The radius follows a wave with ``lobes`` maxima: a cosine (petals) blended with a triangle
    # wave (spikes).
    wave = np.cos(lobes * angle)
    spiky = 1.0 - 2.0 * np.abs(np.arcsin(np.sin(lobes * angle / 2.0))) / np.float32(math.pi / 2.0)
    radius = 1.0 + (depth * ((1.0 - sharpness) * wave + sharpness * spiky) if lobes else 0.0 * wave)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle) * flatness], axis=1)
    return np.asarray(points / np.abs(points).max(), dtype=np.float32)


def _polygon(corners: int, size: float) -> Floats:
    angle = np.arange(corners, dtype=np.float32) * np.float32(2.0 * math.pi / corners)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.float32(size)


def _draw_object(
    random: Random,
    canvas: Floats,
    appearance: Appearance,
    size: float,
    centre: tuple[float, float] | None = None,
) -> None:
    """Paint one object into the canvas: its shadow, body, pattern, mark and shading.

    Args:
        size: radius in pixels.
        centre: (x, y) in pixels; at random if not given.
    """
    # 1. Only the square patch around the object is touched.
    height, width = canvas.shape[1:]
    x_centre, y_centre = centre or (random.uniform(0, width), random.uniform(0, height))
    reach = math.ceil(size * 1.25) + 1
    left = max(round(x_centre) - reach, 0)
    top = max(round(y_centre) - reach, 0)
    patch = canvas[:, top : round(y_centre) + reach, left : round(x_centre) + reach]
    rows, columns = patch.shape[1:]
    middle = np.array([x_centre - left, y_centre - top], np.float32)

    # 2. Rotate, and squeeze across the axis as if seen from the side.
    turns = 0.05 * random.standard_normal() if appearance.upright else random.random()
    angle = 2.0 * math.pi * turns
    cos = math.cos(angle)
    sin = math.sin(angle)
    squeeze = random.uniform(0.75, 1.0)
    rotation = np.array([[cos, sin], [-sin * squeeze, cos * squeeze]], np.float32)
    transform = rotation * np.float32(size)
    outline = _outline(appearance) @ transform + middle

    # 3. Shadow first, then the body over it.
    mask = _coverage((rows, columns), outline)
    shadow = _coverage((rows, columns), outline + np.float32(0.15 * size))
    patch *= 1.0 - 0.45 * cv2.blur(shadow, (3, 3))
    y, x = _grid(rows, columns, (y_centre - top, x_centre - left), (size, size))
    body = _random_rgb(random, appearance.body)
    marking = _random_rgb(random, appearance.marking)
    pattern = _pattern(random, appearance, x * cos - y * sin, x * sin + y * cos)
    painted = body + (marking - body) * pattern
    if appearance.mark[0]:
        corners = _polygon(*appearance.mark) @ transform + middle
        painted += (marking - painted) * _coverage((rows, columns), corners)
    painted *= 1.08 - 0.35 * (x * x + y * y) - 0.3 * (0.7 * x + y)  # light from the upper left
    patch += (painted - patch) * mask


def _grid(
    height: int, width: int, centre: tuple[float, float], unit: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Coordinates (y, x) of rows and columns relative to ``centre``, in units of ``unit`` pixels.

    Shapes (height, 1) and (width,), so that they broadcast to (height, width).
    """
    y = (np.arange(height, dtype=np.float32)[:, None] - np.float32(centre[0])) / np.float32(unit[0])
    x = (np.arange(width, dtype=np.float32) - np.float32(centre[1])) / np.float32(unit[1])
    return y, x


def _coverage(shape: tuple[int, int], points: Floats) -> Floats:
    """How much of each pixel a polygon covers, in [0, 1]; ``shape`` as (rows, columns)."""
    mask = np.zeros(shape, np.uint8)
    fixed_point = np.rint(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(mask, [fixed_point], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return mask * np.float32(1.0 / 255.0)


def _pattern(random: Random, appearance: Appearance, u: Floats, v: Floats) -> Floats:
    """Strength of the second colour in [0, 1], at coordinates (u, v) relative to the object."""
    kind, periods, turns = appearance.pattern
    if kind == PLAIN:
        return np.zeros_like(u)
    angle = math.pi * (turns + 0.03 * random.standard_normal())
    waves = math.pi * periods * math.exp(0.1 * random.standard_normal())
    along = u * math.cos(angle) + v * math.sin(angle)
    across = v * math.cos(angle) - u * math.sin(angle)
    start = random.uniform(0, 2 * math.pi)
    if kind == RINGS:
        wave = np.cos(np.sqrt(u * u + v * v) * waves + start)
    elif kind == STRIPES:
        wave = np.sin(along * waves + start)
    else:
        first = np.sin(along * waves + start)
        second = np.sin(across * waves)
        wave = first * second * 2.0 if kind == CHECKS else first + second - 0.7
    # A steep ramp, clipped: edges of the pattern are sharp but not aliased.
    return np.clip(0.5 + 2.5 * wave, 0.0, 1.0)


def _photograph(random: Random, canvas: Floats) -> Image:
    """Apply light, tint, blur and noise: (3, height, width) -> uint8 (height, width, 3)."""
    height, width = canvas.shape[1:]
    y, x = _grid(height, width, (height / 2.0, width / 2.0), (height / 2.0, width / 2.0))
    angle = random.uniform(0, 2 * math.pi)
    tilt = random.uniform(0.0, 0.25)
    light = (
        1.0
        + tilt * (x * math.cos(angle) + y * math.sin(angle))
        - random.uniform(0.0, 0.15) * (x * x + y * y)
    )
    exposure = random.normal(0.0, 0.07, 3) + random.normal(0.0, 0.16)
    canvas *= light * np.exp(exposure).astype(np.float32)[:, None, None]
    # About half of the images are blurred. Sigma grows with the image, as if it had been scaled
    # down.
    sigma = random.uniform(-0.4, 0.8) * math.sqrt(height * width) / 96.0
    if sigma > 0.2:
        for plane in canvas:
            cv2.GaussianBlur(plane, (0, 0), sigma, dst=plane)
    contrast = random.uniform(0.75, 1.1)
    noise = random.uniform(0.005, 0.035)
    canvas = (
        (canvas - 0.5) * np.float32(contrast)
        + 0.5
        + _sensor_noise(random, height, width) * np.float32(noise)
    )
    pixels = (np.clip(canvas, 0.0, 1.0) * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
