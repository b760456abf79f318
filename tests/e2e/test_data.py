"""`qmixlora data` says what the data holds, and what of it a run could not use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmixlora.recipe import Recipe
from tests.conftest import CommandLine


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path], tmp_path: Path) -> Path:
    """Forty samples of two tasks, one of them twice; two too long."""
    rows = []
    for index in range(40):
        answer = " ".join(["red"] * (500 if index in (3, 30) else 1))
        turns = [{"from": "human", "value": f"what ? {max(index, 1)}"}, {"from": "gpt", "value": answer}]
        rows.append({"task": "t0", "conversations": turns})
    data = {"train": str(write_json("data.json", rows)), "validation": None, "test": None, "max_length": 64}
    (tmp_path / "recipe.yaml").write_text(make_recipe(data=data).to_yaml(), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_what_a_run_could_not_use_is_listed_and_exits_1(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file)
    assert done.code == 1
    for words in ("sample 3 ", "sample 30 ", "over data.max_length, 64", "'red' 38", "Every answer ends in '<eos>'"):
        assert words in done.stdout


def test_the_same_as_json(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "data.validation=8", "--json")
    assert done.code == 0
    train, validation = json.loads(done.stdout)["splits"]
    assert train["samples"] == 32 and validation["samples"] == 8 and train["refused"] == 0
    assert train["tasks"] == {"t0": 32} and train["images"] == {"0": 32}


def test_samples_that_occur_twice_are_counted(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("data", recipe_file, "data.max_length=1000", "--json")
    [train] = json.loads(done.stdout)["splits"]
    assert train["duplicates"] == 1


def test_a_run_stops_before_its_first_step_with_all_of_them(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("train", recipe_file)
    assert done.code == 2 and "2 samples cannot be used" in done.stderr and "sample 30 " in done.stderr
