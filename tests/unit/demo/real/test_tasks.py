"""The tasks in plain English: ten wordings each, four for the test alone; answers that are true of the scene."""

from __future__ import annotations

import random
import re

import pytest

from qmixlora.demo.real.english import things
from qmixlora.demo.real.tasks import DOMAINS, HANDWRITING, HELD_OUT, SCENE_TASKS, RealTask
from qmixlora.demo.real.text import INSTRUCTIONS, KINDS, OPPOSITES, instruction
from qmixlora.demo.real.wordings import TRAINED, WORDINGS
from qmixlora.demo.scenes import Scene, sample_scene
from qmixlora.demo.tasks import TASKS

BY_NAME = {task.name: task for task in (*SCENE_TASKS, HANDWRITING, *HELD_OUT)}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(0)
    return [sample_scene(rng, range(100)) for _ in range(150)]


def asked(name: str, scene: Scene, seed: int, **how: bool) -> tuple[str, str]:
    return BY_NAME[name].ask(scene, random.Random(seed), random.Random(seed), **how)


def test_every_task_has_ten_wordings_and_the_embedded_ones_are_among_them() -> None:
    assert {len(set(wordings)) for wordings in WORDINGS.values()} == {10} and TRAINED == 6
    assert {task.name for task in TASKS} <= set(WORDINGS)


@pytest.mark.parametrize("task", [*SCENE_TASKS, HANDWRITING], ids=lambda task: task.name)
def test_wordings_of_the_test_are_never_trained_on(task: RealTask, scenes: list[Scene]) -> None:
    if task.name == "choice":  # by its wordings alone: what it asks is random
        assert not set(task.wordings[:TRAINED]) & set(task.wordings[TRAINED:])
        return
    trained, other = (
        {asked(task.name, scene, seed, other_words=other)[0] for seed, scene in enumerate(scenes)}
        for other in (False, True)
    )
    assert not trained & other


@pytest.mark.parametrize("task", [task.name for task in TASKS if task.name != "reading"])
def test_answers_in_english_are_those_of_the_embedded_task(task: str, scenes: list[Scene]) -> None:
    embedded = next(other for other in TASKS if other.name == task)
    for seed, scene in enumerate(scenes):
        _, answer = embedded.ask(scene, random.Random(seed))
        assert asked(task, scene, seed)[1] == answer.replace("-", " ")


def test_the_letter_of_a_choice_stands_before_the_right_answer(scenes: list[Scene]) -> None:
    letters = set()
    for seed, scene in enumerate(scenes):
        question, letter = asked("choice", scene, seed)
        offered = dict(re.findall(r"^([ABC])\) (.+)$", question, re.M))
        right = {str(scene.digit), *(word for thing in things(scene).values() for word in thing.split())}
        assert len(set(offered.values())) == 3
        domain = next(name for name, values in DOMAINS.items() if set(offered.values()) <= set(values))
        assert domain == "where" or offered[letter] in right | {"none"}
        letters.add(letter)
    assert letters == {"A", "B", "C"}


def test_a_reason_names_what_is_the_case(scenes: list[Scene]) -> None:
    seen = set()
    for seed, scene in enumerate(scenes):
        question, answer = asked("reason", scene, seed)
        shape, color = re.search(r"the (\w+) is (\w+)", question, re.I).groups()  # type: ignore[union-attr]
        colors = {item.shape: item.color for item in scene.items}
        if shape not in colors:
            assert answer == f"False, there is no {shape}."
        else:
            assert answer == f"{colors[shape] == color}, it is {colors[shape]}."
        seen.add(answer.split(" ")[0] + str(shape in colors))
    assert seen == {"True,True", "False,True", "False,False"}


def test_a_caption_names_every_thing_of_the_scene(scenes: list[Scene]) -> None:
    for seed, scene in enumerate(scenes):
        _, answer = asked("caption", scene, seed)
        assert all(thing in answer.lower() for thing in map(str.lower, things(scene).values()))


def test_instructions_without_an_image_have_right_answers() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question, answer = instruction(rng)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if numbers:
            right = max(numbers) if "larger" in question else sum(numbers)
            assert answer == str(right)
        elif "opposite" in question:
            assert OPPOSITES[re.findall(r"\w+", question)[-1]] == answer
        elif "one of these" in question:
            assert KINDS[question.split()[1]] == answer
    assert len(INSTRUCTIONS) == 6


def test_held_out_tasks_are_none_of_those_trained() -> None:
    assert len(HELD_OUT) == 6 and not {task.name for task in HELD_OUT} & {task.name for task in SCENE_TASKS}
