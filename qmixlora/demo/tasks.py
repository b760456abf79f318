"""What is asked of a scene: captions for the backbone, and tasks that interfere on the same picture.

The tasks follow the spirit of the evaluation sets of the MixLoRA paper: classification (digit, shape), attributes
(color, size), counting, spatial relations, object presence, reading and entailment. Their answers come from different
vocabularies for the same fact: a relation is yes / no, the same relation as a statement is true / false / unknown.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scenes import COLORS, GRID, SHAPES, Item, Scene, place

NUMBERS = ("none", "one", "two")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")


def holds(a: Item, relation: str, b: Item) -> bool:
    """Whether `a` stands in that relation to `b`, by their cells."""
    (row_a, column_a), (row_b, column_b) = divmod(a.cell, GRID), divmod(b.cell, GRID)
    return {
        "left of": column_a < column_b,
        "right of": column_a > column_b,
        "above": row_a < row_b,
        "below": row_a > row_b,
    }[relation]


def spell(sign: str) -> str:
    return " ".join(sign)


# -- captions: facts in declarative form; the backbone is trained on these alone -------------------------------------


def things(scene: Scene) -> dict[int, str]:
    """What stands in each cell."""
    return {
        **{item.cell: f"{item.size} {item.color} {item.shape}" for item in scene.items},
        scene.digit_cell: f"digit {DIGITS[scene.digit]}",
        scene.sign_cell: f"sign {spell(scene.sign)}",
    }


def caption_cell(scene: Scene, cell: int) -> str:
    """One cell: where it is and what stands there."""
    return f"{place(cell)} {things(scene)[cell]} ."


def caption(scene: Scene, rng: random.Random) -> str:
    """Ten statements about the scene, in random order; the two on relations are always among them."""
    facts = [f"digit {DIGITS[scene.digit]} .", f"sign {spell(scene.sign)} ."]
    for item in scene.items:
        facts += [f"{item.shape} {item.color} .", f"{item.shape} {item.size} .", f"{item.shape} {place(item.cell)} ."]
    for color in rng.sample(list(COLORS), 2):
        found = sorted(item.shape for item in scene.items if item.color == color)
        facts += [f"{color} {' '.join(found) or 'none'} .", f"count {color} {NUMBERS[len(found)]} ."]
    facts = rng.sample(facts, 8)
    a, b = rng.sample(scene.items, 2)
    facts.append(f"{a.shape} {rng.choice([r for r in RELATIONS if holds(a, r, b)])} {b.shape} .")
    a, b = rng.sample(scene.items, 2)
    relation = rng.choice(RELATIONS)
    facts.append(f"{a.shape} {relation} {b.shape} {'true' if holds(a, relation, b) else 'false'} .")
    rng.shuffle(facts)
    return " ".join(facts)


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


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    wanted = rng.random() < 0.5
    cases = [
        (a, r, b)
        for a in scene.items
        for b in scene.items
        for r in RELATIONS
        if a is not b and holds(a, r, b) == wanted
    ]
    a, relation, b = rng.choice(cases)
    return f"is the {a.shape} {relation} the {b.shape} ?", "yes" if wanted else "no"


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


@dataclass(frozen=True)
class DemoTask:
    name: str
    ask: Callable[[Scene, random.Random], tuple[str, str]]


TASKS = tuple(
    DemoTask(ask.__name__.removeprefix("_"), ask)
    for ask in (_digit, _count, _color, _shape, _size, _where, _relation, _presence, _reading, _entailment)
)
HELD_OUT = tuple(DemoTask(ask.__name__.removeprefix("_"), ask) for ask in (_shape_at, _digit_where))
