"""The best checkpoint by generated answers or by validation loss is what a run keeps, however it was interrupted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

from qmixlora.data import load_conversations
from qmixlora.data.reading.store import in_memory
from qmixlora.errors import UserError
from qmixlora.files import read_log
from qmixlora.manifest import MANIFEST, seal
from qmixlora.recipe import Recipe, edited
from qmixlora.report.routing import read_routing
from qmixlora.training import run as running
from qmixlora.training import train
from qmixlora.training.best import LOSS, SCORE, Judge, evaluations_since, sample_of, take_best, wins_a_tie
from qmixlora.training.checkpoints import STATE

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


def test_a_best_step_in_the_first_tenth_has_its_routing(make: Callable[..., Recipe]) -> None:
    run = train(make(**{**STANDS_STILL, "max_steps": 40}, early_stopping=1), console=QUIET)
    assert (finish(run)["kept_step"], finish(run)["step"]) == (1, 2)
    assert read_routing(run).steps == read_routing(run / "checkpoints" / "checkpoint-1").steps == [1]


def test_answers_on_a_sample_of_validation_decide(make: Callable[..., Recipe]) -> None:
    run = train(make(max_steps=4, eval_every=2, eval_generate=7), console=QUIET)
    logs = [log for log in read_log(run / "metrics.jsonl") if "eval_score" in log]
    assert [log["step"] for log in logs] == [2, 4]
    tasks = [value for key, value in logs[0].items() if key.startswith("eval_score_")]
    assert len(tasks) == 7 and logs[0]["eval_score"] == pytest.approx(sum(tasks) / 7)
    best = max(logs, key=lambda log: (log["eval_score"], -log["eval_loss"]))
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


BY = {"metric": LOSS, "rows": "digest"}


def resumed(folder: Path, before: dict[str, Any] | None, now: dict[str, Any] | None) -> tuple[TrainerState, list[str]]:
    """The state of a run that goes on from step 6, and what it is told. Its best step was 4, judged as `before`."""
    state = TrainerState(global_step=6, best_global_step=4, best_metric=2.5)
    state.stateful_callbacks = cast(Any, {"Judge": Judge(before).state()} if before != {} else {})
    said: list[str] = []
    Judge(now, said.append).on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
    return state, said


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with the whole checkpoint of step 4."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / STATE).write_text("{}")
    seal(tmp_path / "checkpoint-4")
    return tmp_path


def test_what_is_judged_by_the_same_stays_the_best(checkpoints: Path) -> None:
    as_read = json.loads(json.dumps(BY))
    state, said = resumed(checkpoints, as_read, BY)
    assert (state.best_global_step, state.best_metric, said) == (4, 2.5, [])


@pytest.mark.parametrize(
    ("before", "now", "then"),
    [
        (BY, {**BY, "metric": SCORE}, "evaluations from here on decide"),
        (BY, {**BY, "rows": "other"}, "evaluations from here on decide"),
        ({}, BY, "evaluations from here on decide"),  # a checkpoint that does not say what it was judged by
        (BY, None, "the last step is kept"),
    ],
)
def test_what_is_judged_by_something_else_is_judged_anew(
    checkpoints: Path, before: dict[str, Any], now: dict[str, Any] | None, then: str
) -> None:
    state, said = resumed(checkpoints, before, now)
    assert state.best_global_step is state.best_metric is None
    assert said == [f"Step 4 no longer counts as the best (it was judged by something else): {then}."]
    state.log_history = [{"step": step, LOSS: float("nan")} for step in (2, 4, 6, 8)]
    assert evaluations_since(state, LOSS) == 1  # patience begins anew
    assert cast(Any, state.stateful_callbacks)["Judge"]["args"]["by"] == now  # as the next checkpoint has it


def test_a_best_step_whose_checkpoint_is_gone_or_damaged_is_the_best_no_longer(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-4" / STATE).write_text("{ }")
    state, [said] = resumed(checkpoints, BY, BY)
    assert state.best_global_step is None and f"of its checkpoint, {STATE}" in said
    shutil.rmtree(checkpoints / "checkpoint-4")
    state, [said] = resumed(checkpoints, BY, BY)
    assert state.best_global_step is None and "its checkpoint is gone" in said


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("train.eval_batch_size=1", True),
        ("train.early_stopping=7", True),
        ("train.eval_generate=null", False),
        ("train.eval_generate=6", False),
        ("train.max_new_tokens=3", False),
        ("data.metrics={'*': contains}", False),
    ],
)
def test_a_judge_is_told_from_another(make: Callable[..., Recipe], data: Path, override: str, same: bool) -> None:
    rows, recipe = load_conversations(str(data / "test.json")), make(eval_every=1, eval_generate=5, early_stopping=3)

    def judge(recipe: Recipe, count: int = len(rows)) -> Any:
        return Judge.of(recipe, rows.select(range(count)), print).by

    assert (judge(edited(recipe, [override])) == judge(recipe)) is same
    assert judge(recipe, 5) != judge(recipe)


def test_other_right_answers_are_another_judge_of_scores_alone(make: Callable[..., Recipe], data: Path) -> None:
    rows = load_conversations(str(data / "test.json"))
    others = in_memory([{**row, "references": ["yes", "yeah"]} for row in rows])
    by_score, by_loss = make(eval_every=1, eval_generate=5), make(eval_every=1, early_stopping=3)
    for recipe, same in ((by_score, False), (by_loss, True)):
        assert (Judge.of(recipe, rows, print).by == Judge.of(recipe, others, print).by) is same


def test_a_run_that_is_judged_no_longer_keeps_its_last_step(make: Callable[..., Recipe]) -> None:
    spec = {**STANDS_STILL, "max_steps": 2}
    train(make(**spec, early_stopping=9), console=QUIET)
    screen = io.StringIO()
    run = train(make(**{**spec, "max_steps": 3, "save_every": 3}), resume=True, console=Console(file=screen, width=200))
    assert "Step 1 no longer counts as the best" in screen.getvalue()
    assert finish(run)["step"] == 3 and "kept_step" not in finish(run)
    assert same(run / "adapter", run / "checkpoints" / "checkpoint-3")


def test_a_best_checkpoint_that_is_gone_is_told_and_the_last_step_written_down(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(session: Any, state: TrainerState, folder: Path) -> int | None:
        shutil.rmtree(folder / "checkpoints" / "checkpoint-1")
        return take_best(session, state, folder)

    monkeypatch.setattr(running, "take_best", take)
    screen = io.StringIO()
    run = train(make(**STANDS_STILL, early_stopping=1), console=Console(file=screen, width=200))
    assert (
        "Kept: the adapter of step 2, of 2. The best was that of step 1, whose checkpoint is gone." in screen.getvalue()
    )
    assert (finish(run)["kept_step"], finish(run)["kept_for"]) == (2, None)


@pytest.mark.parametrize(
    ("key", "score", "loss", "wins"),
    [(SCORE, 0.5, 1.9, True), (SCORE, 0.5, 2.0, False), (SCORE, 0.4, 1.0, False), (LOSS, 0.5, 1.9, False)],
)
def test_of_equal_scores_the_lower_loss_is_the_better(key: str, score: float, loss: float, wins: bool) -> None:
    logs = [{"step": 2, SCORE: 0.5, LOSS: 3.0}, {"step": 4, SCORE: 0.5, LOSS: 2.0}, {"step": 4, "loss": 1.0}]
    state = TrainerState(global_step=6, best_global_step=4, best_metric=0.5, log_history=logs)
    assert wins_a_tie(state, key, {SCORE: score, LOSS: loss}) is wins
