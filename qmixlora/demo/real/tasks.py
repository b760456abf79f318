"""The tasks of the real data set: the embedded ones in plain English, and forms of questions that they lack."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from qmixlora.demo import tasks as embedded
from qmixlora.demo.scenes import COLORS, GRID, SHAPES, Scene
from qmixlora.demo.tasks import Asked

from .english import corner, letters, things
from .wordings import HELD_OUT_WORDINGS, TRAINED, WORDINGS

DOMAINS = {  # what a multiple choice may offer
    "digit": tuple(map(str, range(10))),
    "color": tuple(COLORS),
    "shape": (*SHAPES, "none"),
    "where": tuple(map(corner, range(GRID * GRID))),
}
OPTIONS = "ABC"


@dataclass(frozen=True)
class RealTask:
    """A task: its facts, and its wordings, those for training first."""

    name: str
    facts: Callable[[Scene, random.Random], Asked]
    wordings: tuple[str, ...]

    def ask(
        self, scene: Scene, rng: random.Random, words: random.Random, *, other_words: bool = False
    ) -> tuple[str, str]:
        """A question about the scene and its answer: what it asks for from `rng`, how it does from `words`."""
        named, answer = self.facts(scene, rng)
        wordings = self.wordings[TRAINED:] if other_words else self.wordings[:TRAINED]
        question = words.choice(wordings).format(**named)
        return question[0].upper() + question[1:], answer


def _in_english(facts: Callable[[Scene, random.Random], Asked]) -> Callable[[Scene, random.Random], Asked]:
    """The same facts, `top-left` as two words."""

    def english(scene: Scene, rng: random.Random) -> Asked:
        named, answer = facts(scene, rng)
        return {name: value.replace("-", " ") for name, value in named.items()}, answer.replace("-", " ")

    return english


def _reading(scene: Scene, rng: random.Random) -> Asked:
    return {}, letters(scene.sign)


_OPEN = {task.name: _in_english(task.facts) for task in (*embedded.TASKS, *embedded.HELD_OUT)} | {"reading": _reading}


def _choice(scene: Scene, rng: random.Random) -> Asked:
    """A multiple choice of three, the letter of the right one the answer."""
    task = rng.choice(list(DOMAINS))
    named, answer = _OPEN[task](scene, rng)
    offered = [answer, *rng.sample([value for value in DOMAINS[task] if value != answer], len(OPTIONS) - 1)]
    rng.shuffle(offered)
    lines = "\n".join(f"{letter}) {value}" for letter, value in zip(OPTIONS, offered, strict=True))
    question = rng.choice(WORDINGS[task][:TRAINED]).format(**named)
    return {"question": question[0].upper() + question[1:], "options": lines}, OPTIONS[offered.index(answer)]


def _caption(scene: Scene, rng: random.Random) -> Asked:
    """All things in reading order."""
    text = ", ".join(thing for _, thing in sorted(things(scene).items()))
    return {}, f"{text[0].upper()}{text[1:]}."


def _reason(scene: Scene, rng: random.Random) -> Asked:
    """A statement that is true or false, and what is the case."""
    named, verdict = _OPEN["entailment"](scene, rng)
    colors = {item.shape: item.color for item in scene.items}
    reason = f"it is {colors[named['shape']]}" if verdict != "unknown" else f"there is no {named['shape']}"
    return named, f"{'True' if verdict == 'true' else 'False'}, {reason}."


def _written_digit(scene: Scene, rng: random.Random) -> Asked:
    """The digit of a scene, whose scan alone is shown."""
    return {}, str(scene.digit)


FORMS = {"choice": _choice, "caption": _caption, "reason": _reason}
SCENE_TASKS = tuple(
    RealTask(name, FORMS[name] if name in FORMS else _OPEN[name], wordings)
    for name, wordings in WORDINGS.items()
    if name != "handwriting"
)
HANDWRITING = RealTask("handwriting", _written_digit, WORDINGS["handwriting"])
HELD_OUT = tuple(RealTask(name, _OPEN[name], wordings) for name, wordings in HELD_OUT_WORDINGS.items())
TEXT = "text"  # the task of instructions without an image
