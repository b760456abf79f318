"""The tasks of the embedded data set: answers that are true of the scene, questions in words of their own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from qmixlora.demo.scenes import Item, Scene, digit_scans, place, sample_scene
from qmixlora.demo.tasks import HELD_OUT, NUMBERS, TASKS, DemoTask


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(0)
    return [sample_scene(rng, range(100)) for _ in range(300)]


def of_shape(scene: Scene, shape: str) -> Item | None:
    return next((item for item in scene.items if item.shape == shape), None)


def in_cell(scene: Scene, name: str) -> Item:
    return next(item for item in scene.items if place(item.cell) == name)


def counted(scene: Scene, color: str) -> str:
    return NUMBERS[sum(item.color == color for item in scene.items)]


def shape_of_color(scene: Scene, color: str) -> str:
    shapes = [item.shape for item in scene.items if item.color == color]
    assert len(shapes) <= 1  # otherwise there are two answers
    return shapes[0] if shapes else "none"


def side(scene: Scene, words: list[str]) -> str:
    choice = {words[5], words[9]}
    assert choice in ({"top", "bottom"}, {"left", "right"})
    (answer,) = choice & set(place(of_shape(scene, words[2]).cell).split("-"))
    return answer


def present(scene: Scene, color: str, shape: str) -> str:
    item = of_shape(scene, shape)
    return "yes" if item is not None and item.color == color else "no"


def verdict(scene: Scene, shape: str, color: str) -> str:
    item = of_shape(scene, shape)
    return "unknown" if item is None else "true" if item.color == color else "false"


TRUTHS: dict[str, Callable[[Scene, list[str]], str]] = {  # from the scene and the words of the question
    "digit": lambda scene, words: str(digit_scans()[1][scene.digit_image]),
    "count": lambda scene, words: counted(scene, words[2]),
    "color": lambda scene, words: of_shape(scene, words[4]).color,
    "shape": lambda scene, words: shape_of_color(scene, words[3]),
    "size": lambda scene, words: of_shape(scene, words[4]).size,
    "where": lambda scene, words: place(of_shape(scene, words[3]).cell),
    "side": side,
    "presence": lambda scene, words: present(scene, *words[3:5]),
    "reading": lambda scene, words: " ".join(scene.sign),
    "entailment": lambda scene, words: verdict(scene, words[1], words[3]),
    "shape_at": lambda scene, words: in_cell(scene, words[3]).shape,
    "color_at": lambda scene, words: in_cell(scene, words[3]).color,
    "digit_where": lambda scene, words: place(scene.digit_cell),
    "any_shape": lambda scene, words: "yes" if of_shape(scene, words[3]) else "no",
    "small_or_large": lambda scene, words: of_shape(scene, words[2]).size,
    "count_of": lambda scene, words: counted(scene, words[4]),
}


@pytest.mark.parametrize("task", [*TASKS, *HELD_OUT], ids=lambda task: task.name)
def test_answers_are_true_of_the_scene(scenes: list[Scene], task: DemoTask) -> None:
    rng = random.Random(0)
    for scene in scenes:
        question, answer = task.ask(scene, rng)
        assert answer == TRUTHS[task.name](scene, question.split()), (scene, question)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_paraphrase_is_no_question_that_is_trained_on(scenes: list[Scene], task: DemoTask) -> None:
    rng = random.Random(0)
    trained = {task.ask(scene, rng)[0] for scene in scenes}
    assert not trained & {task.ask(scene, rng, other_words=True)[0] for scene in scenes}


def test_held_out_tasks_are_none_of_the_others() -> None:
    assert not {task.name for task in HELD_OUT} & {task.name for task in TASKS}
