"""Captions of a scene for the backbone, and questions about it: tasks that interfere on the same image.

The tasks follow the spirit of the evaluation sets of the MixLoRA paper: classification (digit, shape), attributes
(color, size), counting, spatial relations (where, side), object presence, reading and entailment. Their answers come
from different vocabularies for the same fact: a colour is named, its presence confirmed with yes or no, or a statement
about it is true, false or unknown.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import COLORS, COLUMNS, ROWS, SHAPES, Item, Scene, place

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


# -- tasks: each returns (question, answer) ---------------------------------------------------------------------------


def _digit(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "what digit is written ?", str(scene.digit)


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    color = rng.choice([rng.choice(scene.items).color, rng.choice(list(COLORS))])
    return f"how many {color} shapes are there ?", NUMBERS[sum(item.color == color for item in scene.items)]


def _color(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"what color is the {item.shape} ?", item.color


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    colors = [item.color for item in scene.items]
    unique = [item for item in scene.items if colors.count(item.color) == 1]
    if unique:
        item = rng.choice(unique)
        return f"what shape is {item.color} ?", item.shape
    return f"what shape is {rng.choice(sorted(set(COLORS) - set(colors)))} ?", "none"


def _size(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"how big is the {item.shape} ?", item.size


def _where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"where is the {item.shape} ?", place(item.cell)


def _side(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item, pair = rng.choice(scene.items), rng.choice((ROWS, COLUMNS))
    answer = next(side for side in pair if side in sides(item))
    return f"is the {item.shape} at the {pair[0]} or at the {pair[1]} ?", answer


def _presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        item = rng.choice(scene.items)
        return f"is there a {item.color} {item.shape} ?", "yes"
    seen = {(item.color, item.shape) for item in scene.items}
    color, shape = rng.choice([(c, s) for c in COLORS for s in SHAPES if (c, s) not in seen])
    return f"is there a {color} {shape} ?", "no"


def _reading(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "what does the sign say ?", spell(scene.sign)


def _entailment(scene: Scene, rng: random.Random) -> tuple[str, str]:
    verdict = rng.choice(("true", "false", "unknown"))
    missing = [shape for shape in SHAPES if shape not in {item.shape for item in scene.items}]
    item = rng.choice(scene.items)
    if verdict == "unknown":
        shape, color = rng.choice(missing), rng.choice(list(COLORS))
    elif verdict == "true":
        shape, color = item.shape, item.color
    else:
        shape, color = item.shape, rng.choice([c for c in COLORS if c != item.color])
    return f"the {shape} is {color} : true , false or unknown ?", verdict


def _shape_at(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"what shape is {place(item.cell)} ?", item.shape


def _digit_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "where is the digit ?", place(scene.digit_cell)


def _color_at(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"what color is {place(item.cell)} ?", item.color


def _any_shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shapes = {item.shape for item in scene.items}
    shape = rng.choice(sorted(shapes)) if rng.random() < 0.5 else rng.choice(sorted(set(SHAPES) - shapes))
    return f"is there a {shape} ?", "yes" if shape in shapes else "no"


def _small_or_large(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    return f"is the {item.shape} small or large ?", item.size


def _count_of(scene: Scene, rng: random.Random) -> tuple[str, str]:
    color = rng.choice([rng.choice(scene.items).color, rng.choice(list(COLORS))])
    return f"how many shapes are {color} ?", NUMBERS[sum(item.color == color for item in scene.items)]


@dataclass(frozen=True)
class DemoTask:
    """A task: its questions, and another order of their words, which no training sample has."""

    ask: Callable[[Scene, random.Random], tuple[str, str]]
    pattern: str = ""
    other_words: str = ""

    @property
    def name(self) -> str:
        return self.ask.__name__.removeprefix("_")

    def paraphrase(self, question: str) -> str:
        return re.sub(self.pattern, self.other_words, question)


TASKS = (
    DemoTask(_digit, "what digit is written", "written is what digit"),
    DemoTask(_count, r"how many (\w+) shapes are there", r"\1 shapes : how many are there"),
    DemoTask(_color, r"what color is the (\w+)", r"the \1 is what color"),
    DemoTask(_shape, r"what shape is (\w+)", r"\1 is what shape"),
    DemoTask(_size, r"how big is the (\w+)", r"the \1 is how big"),
    DemoTask(_where, r"where is the (\w+)", r"the \1 is where"),
    DemoTask(_side, r"is the (\w+) at the (\w+) or at the (\w+)", r"at the \2 or at the \3 is the \1"),
    DemoTask(_presence, r"is there a (\w+) (\w+)", r"a \1 \2 is there"),
    DemoTask(_reading, "what does the sign say", "the sign does say what"),
    DemoTask(_entailment, r"the (\w+) is (\w+) : true , false or unknown", r"true , false or unknown : the \1 is \2"),
)
HELD_OUT = tuple(map(DemoTask, (_shape_at, _color_at, _digit_where, _any_shape, _small_or_large, _count_of)))
