"""Small drawn scenes: the things in an image, and the image itself.

A scene is a 2 x 2 grid of 16-pixel cells. It holds two coloured shapes, one handwritten digit (scikit-learn's bundled
set: 1,797 real 8 x 8 scans) and one sign with two letters, so every task can be asked of every image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from qmixlora.errors import UserError

CELL = 16  # pixels
GRID = 2  # cells per side
IMAGE_SIZE = CELL * GRID  # 32 pixels
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 250),
    "yellow": (240, 220, 50),
    "purple": (180, 60, 220),
}
SIZES = {"small": 3, "large": 6}  # half the side, in pixels
ROWS = ("top", "bottom")
COLUMNS = ("left", "right")
LETTERS = {  # 5 x 7 pixels, a bit per pixel, most significant bit left
    "a": (0x0E, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11),
    "c": (0x0E, 0x11, 0x10, 0x10, 0x10, 0x11, 0x0E),
    "e": (0x1F, 0x10, 0x10, 0x1E, 0x10, 0x10, 0x1F),
    "h": (0x11, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11),
    "k": (0x11, 0x12, 0x14, 0x18, 0x14, 0x12, 0x11),
    "t": (0x1F, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04),
    "v": (0x11, 0x11, 0x11, 0x11, 0x0A, 0x0A, 0x04),
    "z": (0x1F, 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F),
}


@dataclass(frozen=True)
class Item:
    """One coloured shape (no shape repeats within a scene); `cell` counts from the top left in reading order."""

    shape: str
    color: str
    size: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """Everything that an image shows. `digit_image` indexes `digit_scans(...)`; the seed fixes the drawing's jitter."""

    items: tuple[Item, ...]
    digit: int
    digit_image: int
    digit_cell: int
    sign: str
    sign_cell: int
    seed: int


def place(cell: int) -> str:
    """The name of a cell, such as `top-left`."""
    return f"{ROWS[cell // GRID]}-{COLUMNS[cell % GRID]}"


@cache
def digit_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Real handwritten digits: scans (N x 8 x 8, 0 to 255) and labels (N). Raises UserError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "The demo's handwritten digits come with scikit-learn, which is not installed.",
            fix="pip install 'qmixlora[demo]'",
        ) from None
    digits = load_digits()
    return (digits.images * 255 / 16).astype(np.uint8), digits.target


def sample_scene(rng: random.Random, scans: Sequence[int]) -> Scene:
    """Draw a scene at random; its digit is one of the scans listed (so that splits share no handwriting)."""
    cells = rng.sample(range(GRID * GRID), GRID * GRID)
    items = tuple(
        Item(shape, rng.choice(list(COLORS)), rng.choice(list(SIZES)), cell)
        for shape, cell in zip(rng.sample(SHAPES, 2), cells, strict=False)
    )
    scan = rng.choice(scans)
    sign = rng.choice(list(LETTERS)) + rng.choice(list(LETTERS))
    return Scene(items, int(digit_scans()[1][scan]), scan, cells[2], sign, cells[3], rng.randrange(2**31))


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, x: int, y: int) -> None:
    half, color = SIZES[item.size], COLORS[item.color]
    box = (x - half, y - half, x + half, y + half)
    if item.shape == "circle":
        draw.ellipse(box, fill=color)
    elif item.shape == "ring":
        draw.ellipse(box, outline=color, width=2)
    elif item.shape == "square":
        draw.rectangle(box, fill=color)
    elif item.shape == "triangle":
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=color)
    else:
        draw.line((x - half, y, x + half, y), fill=color, width=2)
        draw.line((x, y - half, x, y + half), fill=color, width=2)


def _draw_sign(draw: ImageDraw.ImageDraw, sign: str, left: int, top: int) -> None:
    for index, letter in enumerate(sign):
        for row, bits in enumerate(LETTERS[letter]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    draw.point((left + 2 + 7 * index + column, top + 4 + row), fill=(255, 255, 255))


def draw_scan(index: int, side: int) -> Image.Image:
    """Draw a handwritten digit: RGB, `side` pixels wide and high."""
    scan = Image.fromarray(digit_scans()[0][index]).resize((side, side), Image.Resampling.BILINEAR)
    return Image.merge("RGB", [scan] * 3)


def draw_scene(scene: Scene, only_cell: int | None = None) -> Image.Image:
    """Draw a scene: RGB, IMAGE_SIZE x IMAGE_SIZE pixels, on dark noise; the same for the same scene.

    With `only_cell` everything outside that cell is left out.
    """
    rng = np.random.default_rng(scene.seed)
    pixels = rng.integers(0, 40, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels.copy())
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        slack = CELL // 2 - SIZES[item.size] - 1
        dx, dy = rng.integers(-slack, slack + 1, 2) if slack else (0, 0)
        row, column = divmod(item.cell, GRID)
        _draw_item(draw, item, column * CELL + CELL // 2 + int(dx), row * CELL + CELL // 2 + int(dy))
    row, column = divmod(scene.sign_cell, GRID)
    _draw_sign(draw, scene.sign, column * CELL, row * CELL)
    row, column = divmod(scene.digit_cell, GRID)
    image.paste(draw_scan(scene.digit_image, CELL), (column * CELL, row * CELL))
    if only_cell is None:
        return image
    row, column = divmod(only_cell, GRID)
    box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
    alone = Image.fromarray(pixels)
    alone.paste(image.crop(box), box)
    return alone
