"""A scene in plain English: what stands in a cell, and captions."""

from __future__ import annotations

import random

from qmixlora.demo.scenes import GRID, Scene, place


def corner(cell: int) -> str:
    """The name of a cell, such as `top left`."""
    return place(cell).replace("-", " ")


def things(scene: Scene) -> dict[int, str]:
    """The thing in each cell, with its article."""
    return {
        **{item.cell: f"a {item.size} {item.color} {item.shape}" for item in scene.items},
        scene.digit_cell: f"the digit {scene.digit}",
        scene.sign_cell: f"the sign {letters(scene.sign)}",
    }


def letters(sign: str) -> str:
    """The letters of a sign as they are written on it: `K T`."""
    return " ".join(sign.upper())


def caption(scene: Scene, rng: random.Random) -> str:
    """Name the thing in each corner, the corners in random order: never how many have a colour, or which.

    The tasks that ask for that have to be learned from their own samples.
    """
    named = things(scene)
    cells = rng.sample(range(GRID * GRID), GRID * GRID)
    return " ".join(f"{corner(cell).capitalize()}: {named[cell]}." for cell in cells)
