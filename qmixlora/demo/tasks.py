"""Captions of a scene for the backbone, and questions about it: tasks that interfere on the same image.

The tasks follow the spirit of the evaluation sets of the MixLoRA paper: classification (digit, shape), attributes
(color, size), counting, spatial relations (where, side), object presence, reading and entailment. Their answers come
from different vocabularies for the same fact: a colour is named, its presence confirmed with yes or no, or a statement
about it is true, false or unknown.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import COLORS, COLUMNS, ROWS, SHAPES, Item, Scene, place

Asked = tuple[dict[str, str], str]  # what a question names, by its place in the question; the answer
NUMBERS = ("none", "one", "two")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def sides(item: Item) -> set[str]:
    """The sides of the image that the item stands on: one of top and bottom, one of left and right."""
    return set(place(item.cell).split("-"))


def spell(sign: str) -> str:
    return " ".join(sign)


# -- captions: facts in declarative form; the backbone is trained on these alone -------------------------------------


def things(scene: Scene) -> dict[int, str]:
    """The thing in each cell."""
    return {
        **{item.cell: f"{item.size} {item.color} {item.shape}" for item in scene.items},
        scene.digit_cell: f"digit {DIGITS[scene.digit]}",
        scene.sign_cell: f"sign {spell(scene.sign)}",
    }


def caption_cell(scene: Scene, cell: int) -> str:
    """One cell: its name and the thing in it."""
    return f"{place(cell)} {things(scene)[cell]} ."


def caption(scene: Scene, rng: random.Random) -> str:
    """Name the things, one by one, in random order: never how many have a colour, or which. The tasks that ask for that
    (count, shape, presence, entailment) have to be learned from their own samples.
    """
    facts = [f"digit {DIGITS[scene.digit]} .", f"sign {spell(scene.sign)} ."]
    for item in scene.items:
        facts += [f"{item.shape} {item.color} .", f"{item.shape} {item.size} .", f"{item.shape} {place(item.cell)} ."]
    return " ".join(rng.sample(facts, len(facts)))


# -- facts: each returns what its question names, and the answer -----------------------------------------------------


def _digit(scene: Scene, rng: random.Random) -> Asked:
    return {}, str(scene.digit)


def _count(scene: Scene, rng: random.Random) -> Asked:
    color = rng.choice([rng.choice(scene.items).color, rng.choice(list(COLORS))])
    return {"color": color}, NUMBERS[sum(item.color == color for item in scene.items)]


def _color(scene: Scene, rng: random.Random) -> Asked:
    item = rng.choice(scene.items)
    return {"shape": item.shape}, item.color


def _shape(scene: Scene, rng: random.Random) -> Asked:
    colors = [item.color for item in scene.items]
    unique = [item for item in scene.items if colors.count(item.color) == 1]
    if unique:
        item = rng.choice(unique)
        return {"color": item.color}, item.shape
    return {"color": rng.choice(sorted(set(COLORS) - set(colors)))}, "none"


def _size(scene: Scene, rng: random.Random) -> Asked:
    item = rng.choice(scene.items)
    return {"shape": item.shape}, item.size


def _where(scene: Scene, rng: random.Random) -> Asked:
    item = rng.choice(scene.items)
    return {"shape": item.shape}, place(item.cell)


def _side(scene: Scene, rng: random.Random) -> Asked:
    item, pair = rng.choice(scene.items), rng.choice((ROWS, COLUMNS))
    answer = next(side for side in pair if side in sides(item))
    return {"shape": item.shape, "side": pair[0], "other": pair[1]}, answer


def _presence(scene: Scene, rng: random.Random) -> Asked:
    if rng.random() < 0.5:
        item = rng.choice(scene.items)
        return {"color": item.color, "shape": item.shape}, "yes"
    seen = {(item.color, item.shape) for item in scene.items}
    color, shape = rng.choice([(c, s) for c in COLORS for s in SHAPES if (c, s) not in seen])
    return {"color": color, "shape": shape}, "no"


def _reading(scene: Scene, rng: random.Random) -> Asked:
    return {}, spell(scene.sign)


def _entailment(scene: Scene, rng: random.Random) -> Asked:
    verdict = rng.choice(("true", "false", "unknown"))
    missing = [shape for shape in SHAPES if shape not in {item.shape for item in scene.items}]
    item = rng.choice(scene.items)
    if verdict == "unknown":
        shape, color = rng.choice(missing), rng.choice(list(COLORS))
    elif verdict == "true":
        shape, color = item.shape, item.color
    else:
        shape, color = item.shape, rng.choice([c for c in COLORS if c != item.color])
    return {"shape": shape, "color": color}, verdict


def _shape_at(scene: Scene, rng: random.Random) -> Asked:
    item = rng.choice(scene.items)
    return {"place": place(item.cell)}, item.shape


def _digit_where(scene: Scene, rng: random.Random) -> Asked:
    return {}, place(scene.digit_cell)


def _color_at(scene: Scene, rng: random.Random) -> Asked:
    item = rng.choice(scene.items)
    return {"place": place(item.cell)}, item.color


def _any_shape(scene: Scene, rng: random.Random) -> Asked:
    shapes = {item.shape for item in scene.items}
    shape = rng.choice(sorted(shapes)) if rng.random() < 0.5 else rng.choice(sorted(set(SHAPES) - shapes))
    return {"shape": shape}, "yes" if shape in shapes else "no"


def _small_or_large(scene: Scene, rng: random.Random) -> Asked:
    item = rng.choice(scene.items)
    return {"shape": item.shape}, item.size


def _count_of(scene: Scene, rng: random.Random) -> Asked:
    color = rng.choice([rng.choice(scene.items).color, rng.choice(list(COLORS))])
    return {"color": color}, NUMBERS[sum(item.color == color for item in scene.items)]


@dataclass(frozen=True)
class DemoTask:
    """A task: its question, and the same in another order of words, which no training sample has."""

    facts: Callable[[Scene, random.Random], Asked]
    question: str
    other_words: str = ""

    @property
    def name(self) -> str:
        return self.facts.__name__.removeprefix("_")

    def ask(self, scene: Scene, rng: random.Random, *, other_words: bool = False) -> tuple[str, str]:
        """A question about the scene and its answer. In other words it is about the same."""
        named, answer = self.facts(scene, rng)
        return (self.other_words if other_words else self.question).format(**named), answer


TASKS = (
    DemoTask(_digit, "what digit is written ?", "written is what digit ?"),
    DemoTask(_count, "how many {color} shapes are there ?", "{color} shapes : how many are there ?"),
    DemoTask(_color, "what color is the {shape} ?", "the {shape} is what color ?"),
    DemoTask(_shape, "what shape is {color} ?", "{color} is what shape ?"),
    DemoTask(_size, "how big is the {shape} ?", "the {shape} is how big ?"),
    DemoTask(_where, "where is the {shape} ?", "the {shape} is where ?"),
    DemoTask(
        _side,
        "is the {shape} at the {side} or at the {other} ?",
        "at the {side} or at the {other} is the {shape} ?",
    ),
    DemoTask(_presence, "is there a {color} {shape} ?", "a {color} {shape} is there ?"),
    DemoTask(_reading, "what does the sign say ?", "the sign does say what ?"),
    DemoTask(
        _entailment,
        "the {shape} is {color} : true , false or unknown ?",
        "true , false or unknown : the {shape} is {color} ?",
    ),
)
HELD_OUT = (
    DemoTask(_shape_at, "what shape is {place} ?"),
    DemoTask(_color_at, "what color is {place} ?"),
    DemoTask(_digit_where, "where is the digit ?"),
    DemoTask(_any_shape, "is there a {shape} ?"),
    DemoTask(_small_or_large, "is the {shape} small or large ?"),
    DemoTask(_count_of, "how many shapes are {color} ?"),
)
