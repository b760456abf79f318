"""The best checkpoint by generated answers or by validation loss is what a run keeps, however it was interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.files import read_log
from qmixlora.manifest import MANIFEST
from qmixlora.recipe import Recipe
from qmixlora.report.routing import read_routing
from qmixlora.training import train
from qmixlora.training.best import sample_of

from .helpers import QUIET

# steps too small to change a parameter: no evaluation is better than the first (the routers' centres move all the same)
STANDS_STILL = {"max_steps": 8, "eval_every": 1, "learning_rate": 1e-30, "save_every": None}


@pytest.fixture
def make(make_recipe: Callable[..., Recipe], data: Path) -> Callable[..., Recipe]:
    return lambda **spec: make_recipe(data={"validation": str(data / "test.json")}, train=spec)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return tensors


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def finish(run: Path) -> dict[str, Any]:
    return read_log(run / "history.jsonl")[-1]


def test_a_run_that_gets_no_better_stops_and_keeps_its_best_step(make: Callable[..., Recipe]) -> None:
    run = train(make(**STANDS_STILL, early_stopping=2, keep_checkpoints=1), console=QUIET)
    assert [log["step"] for log in read_log(run / "metrics.jsonl") if "eval_loss" in log] == [1, 2, 3]
    assert (finish(run)["kept_step"], finish(run)["step"]) == (1, 3)
    best = run / "checkpoints" / "checkpoint-1"
    assert same(run / "adapter", best) and read_routing(run).steps == read_routing(best).steps == [1]


def test_answers_on_a_sample_of_validation_decide(make: Callable[..., Recipe]) -> None:
    run = train(make(max_steps=4, eval_every=2, eval_generate=7), console=QUIET)
    logs = [log for log in read_log(run / "metrics.jsonl") if "eval_score" in log]
    assert [log["step"] for log in logs] == [2, 4]
    tasks = [value for key, value in logs[0].items() if key.startswith("eval_score_")]
    assert len(tasks) == 7 and logs[0]["eval_score"] == pytest.approx(sum(tasks) / 7)
    best = max(logs, key=lambda log: (log["eval_score"], -log["step"]))
    assert finish(run)["kept_step"] == best["step"] and finish(run)["kept_for"] == best["eval_score"]
    assert same(run / "adapter", run / "checkpoints" / f"checkpoint-{best['step']}")


def test_a_run_that_was_killed_after_its_best_step_keeps_the_same(make: Callable[..., Recipe], tmp_path: Path) -> None:
    spec = {**STANDS_STILL, "early_stopping": 3, "eval_generate": 5, "save_every": 1, "keep_checkpoints": 2}
    straight = train(make(**spec, output=str(tmp_path / "straight")), console=QUIET)
    assert (finish(straight)["kept_step"], finish(straight)["step"]) == (1, 4)
    killed = Path(shutil.copytree(straight, tmp_path / "killed"))
    shutil.rmtree(killed / "adapter")
    (killed / MANIFEST).unlink()
    shutil.rmtree(killed / "checkpoints" / f"checkpoint-{finish(straight)['step']}")
    lines = (killed / "history.jsonl").read_text().splitlines()
    (killed / "history.jsonl").write_text(f"{lines[0]}\n")
    train(make(**spec, output=str(killed)), resume=True, console=QUIET)
    for key in ("step", "kept_step", "kept_for"):
        assert finish(killed)[key] == finish(straight)[key], key
    assert same(straight / "adapter", killed / "adapter")


def test_a_sample_has_as_much_of_every_task_as_can_be(data: Path) -> None:
    rows = load_conversations(str(data / "train.json"))
    counts = [sample_of(rows, 25, seed=0)["task"].count(task) for task in sorted(set(rows["task"]))]
    assert sum(counts) == 25 and set(counts) == {2, 3}
    assert sample_of(rows, 25, seed=0)["turns"] == sample_of(rows, 25, seed=0)["turns"]
    assert sample_of(rows, 25, seed=0)["turns"] != sample_of(rows, 25, seed=1)["turns"]
    assert len(sample_of(rows, 10**6, seed=0)) == len(rows)


def test_what_cannot_be_judged_is_refused_before_the_first_step(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"train\.eval_generate: there is nothing to evaluate on"):
        make_recipe(train={"eval_generate": 8})
    with pytest.raises(UserError, match="answers need the vision tower"):
        make_recipe(
            adapter={"train_projector": False},
            data={"validation": 0.1},
            train={"eval_generate": 8, "cache_features": True},
        )


def test_a_metric_that_cannot_be_had_is_told_before_the_first_step(
    make_recipe: Callable[..., Recipe], data: Path
) -> None:
    metrics = {"validation": str(data / "test.json"), "metrics": {"*": "nowhere:score"}, "allow_code": True}
    recipe = make_recipe(data=metrics, train={"eval_generate": 8})
    with pytest.raises(UserError, match="There is no metric nowhere:score"):
        train(recipe, console=QUIET)
    assert not (Path(recipe.train.output) / "metrics.jsonl").exists()
