"""A run teaches every answer of a conversation, also where a chat template writes the last one otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from qmixlora.files import read_log
from qmixlora.recipe import Recipe
from qmixlora.training import train

TURNS = [
    {"from": "human", "value": "what is it ?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "what is it ?"},
    {"from": "gpt", "value": "left"},
]


@pytest.mark.parametrize(("last", "steps"), [("", 2), ("{% if loop.last %}{{ word or 'seven' }} {% endif %}", 4)])
def test_an_epoch_has_a_step_for_every_sample_that_a_conversation_makes(
    make_recipe: Callable[..., Recipe], backbone: Path, tmp_path: Path, last: str, steps: int
) -> None:
    folder = Path(shutil.copytree(backbone, tmp_path / "backbone"))
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8")
    file.write_text(template.replace("'assistant' %}assistant : ", f"'assistant' %}}assistant : {last}"))
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TURNS}] * 2), encoding="utf-8")
    recipe = make_recipe(
        model={"id": str(folder), "template_arguments": {"word": "blue"} if last else {}},
        adapter={"projector": "frozen"},
        data={"train": str(tmp_path / "d.json"), "test": None},
        train={"max_steps": None, "micro_batch_size": 1},
    )
    run = train(recipe, console=Console(quiet=True))
    assert max(record["step"] for record in read_log(run / "metrics.jsonl")) == steps


def counts_of(
    make_recipe: Callable[..., Recipe], folder: Path, rows: list[object], adapter: dict[str, object], *, steps: int
) -> dict[str, int]:
    """The instances of every task in the routing record of a run on these rows, all of them in each step."""
    (folder / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = make_recipe(
        adapter={"projector": "frozen", **adapter},
        data={"train": str(folder / "d.json"), "test": None},
        train={"max_steps": steps, "micro_batch_size": len(rows)},
    )
    run = train(recipe, console=Console(quiet=True))
    with safe_open(run / "routing.safetensors", "pt") as file:
        tasks, counts = json.loads(file.metadata()["tasks"]), file.get_tensor("count").tolist()
    assert tasks == sorted(tasks)
    return dict(zip(tasks, counts, strict=True))


def test_a_run_records_every_answer_for_its_own_task(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Two conversations of a color and a digit, and one of two digits."""
    tasks = [["color", "digit"], ["color", "digit"], "digit"]
    rows = [{"conversations": TURNS, "task": task} for task in tasks]
    assert counts_of(make_recipe, tmp_path, rows, {"task_mix": 0.5}, steps=3) == {"color": 2, "digit": 4}


@pytest.mark.parametrize("adapter", [{}, {"task_mix": 0.5}, {"route_on": "task"}])
def test_a_task_of_answers_that_are_not_learned_is_none_of_the_runs(
    make_recipe: Callable[..., Recipe], tmp_path: Path, adapter: dict[str, object]
) -> None:
    """The answer stands in the conversation all the same: routed on the task, by the mean over those that are."""
    shown = [{**turn, "weight": 0, "task": "place"} if turn["value"] == "red" else turn for turn in TURNS]
    rows = [{"conversations": turns, "task": task} for turns, task in ((shown, "color"), (shown, "digit"))]
    assert counts_of(make_recipe, tmp_path, rows, adapter, steps=2) == {"color": 1, "digit": 1}
