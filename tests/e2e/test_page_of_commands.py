"""The commands of docs/commands.md, typed one after another as they stand there, on a run of two tasks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qmixlora.recipe import Recipe
from tests.conftest import CommandLine

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| `qmixlora ([^`]+)` \|", PAGE, re.MULTILINE)
# minutes, a GPU, a server, another package, one router for the model: in other tests
ELSEWHERE = ("demo", "new", "plan my.yaml --probe", "check", "recipes copy", "export runs/my --all --as gguf", "route")
TASKS = {"digit": "counting", "color": "reading"}  # of the embedded data: as the page calls them


@pytest.fixture
def place(make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> Path:
    """A folder with what the page names: my.yaml, its data, and a picture."""
    for split, source in {"train": "train", "validation": "train", "test": "test"}.items():  # four batches of each task
        rows = json.loads((data / f"{source}.json").read_text(encoding="utf-8"))
        own = [row | {"task": TASKS[row["task"]]} for row in rows if row["task"] in TASKS]
        (tmp_path / f"{split}.json").write_text(json.dumps(own), encoding="utf-8")
    shutil.copytree(data / "images", tmp_path / "images")
    shutil.copy(next((data / "images").glob("*.png")), tmp_path / "photo.png")
    recipe = make_recipe(adapter={"num_factors": 16, "r": 4}, train={"max_steps": 2, "output": "runs/my"})
    values = yaml.safe_load(recipe.to_yaml())
    values["data"].update(train="train.json", validation="validation.json", test="test.json")
    values["export"] = {"polish": 0, "samples": 2}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path


@pytest.mark.long
def test_every_command_of_the_page_runs_as_it_stands_there(qmixlora: CommandLine, place: Path) -> None:
    for words in ("train my.yaml adapter.method=lora train.output=runs/lora", "eval runs/lora"):
        done = qmixlora(*words.split(), cwd=place)
        assert done.code == 0, done.stderr
    typed = [command for command in COMMANDS if not command.startswith(ELSEWHERE)]
    assert len(typed) >= 16
    for command in typed:
        done = qmixlora(*shlex.split(command), cwd=place, stdin="what digit ?\n\n")
        assert done.code == 0, (command, done.stdout, done.stderr)
