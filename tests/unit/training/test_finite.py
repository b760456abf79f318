"""A step that is not finite is never kept: it stops the run, or is left out, and says where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qmixlora.data import words
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from qmixlora.training import run, train
from qmixlora.training.finite import SAMPLES, FiniteSteps, NamingCollator, NotFiniteError, NumberedRows
from tests.pretended_cuda import PretendedCuda, put

from .card import records, weights
from .helpers import QUIET, rows_of

Spoil = Callable[[TunedSession], None]


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], None]:
    """Change the sessions that runs open from now on."""
    open_session = run.open_session

    def spoil(change: Spoil) -> None:
        def opened(recipe: Recipe, tasks: list[str]) -> TunedSession:
            session = open_session(recipe, tasks)
            change(session)
            return session

        monkeypatch.setattr(run, "open_session", opened)

    return spoil


def nan_at(*steps: int) -> Spoil:
    """The forward passes of some steps (of one micro-batch each) give NaN."""

    def spoil(session: TunedSession) -> None:
        passes = iter(range(1, 999))

        def poison(module: Any, args: Any, output: Any) -> Any:
            return output * float("nan") if module.training and next(passes) in steps else output

        session.backbone.model.language_model.norm.register_forward_hook(poison)

    return spoil


def strict_records(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stopped(recipe: Recipe) -> NotFiniteError:
    with pytest.raises(NotFiniteError) as error:
        train(recipe, console=QUIET)
    assert not (Path(recipe.train.output) / "adapter").exists()
    return error.value


def test_a_loss_that_is_nan_stops_the_run_and_names_step_samples_and_dtype(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None]
) -> None:
    spoiled(nan_at(6))
    recipe = make_recipe(train={"max_steps": 9, "save_every": 2, "micro_batch_size": 1, "keep_checkpoints": 2})
    message = str(stopped(recipe))
    for word in ("loss of step 6 is nan", "float32", "task ", ".png"):
        assert word in message
    folder = Path(recipe.train.output)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]  # none rotated away, the last kept
    assert [record["step"] for record in strict_records(folder)] == [1, 2, 3, 4, 5]
    last = load_file(folder / "checkpoints" / "checkpoint-5" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in last.values())


@pytest.mark.long
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None], tmp_path: Path
) -> None:
    spec = {"max_steps": 6, "save_every": None}
    straight = train(make_recipe(train={**spec, "output": str(tmp_path / "straight")}), console=QUIET)
    spoiled(nan_at(4))
    recipe = make_recipe(train=spec)
    stopped(recipe)
    spoiled(lambda session: None)
    resumed = train(recipe, resume=True, console=QUIET)
    own, other = weights(resumed), weights(straight)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_a_gradient_that_is_not_finite_stops_the_run(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None]
) -> None:
    def spoil(session: TunedSession) -> None:
        first = next(p for p in session.model.parameters() if p.requires_grad)
        first.register_hook(lambda gradient: gradient + float("inf"))

    spoiled(spoil)
    message = str(stopped(make_recipe()))
    assert "gradient norm of step 1 is inf" in message and " (task " in message


def test_a_parameter_that_is_not_finite_stops_the_run_before_it_is_saved(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"learning_rate": 1e37, "schedule": "constant", "warmup_ratio": 0, "save_every": 1})
    message = str(stopped(recipe))
    assert "After step 1" in message and "not finite, such as" in message
    assert "no checkpoint is lost" not in message and "these samples" not in message and "skip past" not in message
    assert not checkpoints(Path(recipe.train.output))


def test_a_skipped_step_changes_nothing_and_is_counted(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None]
) -> None:
    spoiled(nan_at(3))
    recipe = make_recipe(train={"max_steps": 6, "on_nan": "skip", "save_every": 1, "keep_checkpoints": 9})
    folder = train(recipe, console=QUIET)
    saved = [
        load_file(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in range(1, 7)
    ]
    assert all(torch.equal(saved[1][name], saved[2][name]) for name in saved[0])
    assert not any(torch.equal(saved[2][name], saved[3][name]) for name in saved[0] if "mixlora_A" in name)
    assert all(tensor.isfinite().all() for tensor in saved[5].values())
    found = strict_records(folder)
    (skipped,) = [record for record in found if "skipped" in record]
    assert skipped["step"] == 3 and len(skipped["samples"]) == 4
    losses = {record["step"]: record["loss"] for record in found if "loss" in record}
    assert losses[3] is None and all(loss > 0 for step, loss in losses.items() if step != 3)
    assert all(record["train_loss"] > 0 for record in found if "train_loss" in record)


def test_samples_of_a_skipped_step_do_not_count_in_the_routing(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None]
) -> None:
    """Three snapshots in three steps: the second counts nothing, so that the means of the first stay."""
    spoiled(nan_at(2))
    folder = train(make_recipe(train={"max_steps": 2, "on_nan": "skip"}), console=QUIET)
    counts = load_file(folder / "routing.safetensors")["count"]
    assert counts.sum() == 4


def test_the_mean_of_logged_losses_is_over_the_steps_that_were_taken(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None], tmp_path: Path
) -> None:
    spec = {"max_steps": 4, "on_nan": "skip", "schedule": "constant", "warmup_ratio": 0.0}
    spoiled(nan_at(2))
    every, once = (
        train(make_recipe(train={**spec, "log_every": often, "output": str(tmp_path / str(often))}), console=QUIET)
        for often in (1, 4)
    )
    losses = [record["loss"] for record in records(every) if record.get("loss") is not None]
    (mean,) = [record["loss"] for record in records(once) if "loss" in record]
    assert len(losses) == 3 and mean == pytest.approx(sum(losses) / 3)


def test_the_third_step_in_a_row_stops_the_run(
    make_recipe: Callable[..., Recipe], spoiled: Callable[[Spoil], None]
) -> None:
    spoiled(nan_at(2, 3, 5, 6, 7))
    recipe = make_recipe(train={"max_steps": 9, "on_nan": "skip"})
    assert "loss of step 7 is nan, the third step in a row" in str(stopped(recipe))


def test_a_step_is_judged_by_one_wait(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    steps, numbers = FiniteSteps(make_recipe(), tmp_path, print), [torch.tensor(float(n)) for n in (1, 2, 3)]
    put(numbers)
    cuda = PretendedCuda()
    with cuda.pretended():
        for loss in numbers[:2]:
            steps.add(loss, ["a sample"])
        assert cuda.count() == 0, cuda.table()
        assert steps.may_be_taken(1, numbers[2])
    assert cuda.count() == 1, cuda.table()


def test_a_validation_loss_that_is_nan_is_no_number_in_the_log(
    make_recipe: Callable[..., Recipe], data: Path, spoiled: Callable[[Spoil], None]
) -> None:
    def spoil(session: TunedSession) -> None:
        def poison(module: Any, args: Any, output: Any) -> Any:
            return output if module.training else output * float("nan")

        session.backbone.model.language_model.norm.register_forward_hook(poison)

    spoiled(spoil)
    recipe = make_recipe(data={"validation": str(data / "validation.json")}, train={"max_steps": 1, "eval_every": 1})
    found = strict_records(train(recipe, console=QUIET))
    assert [record["eval_loss"] for record in found if "eval_loss" in record] == [None]


def test_a_mistake_in_a_batch_names_where_the_sample_comes_from_or_its_number(
    make_recipe: Callable[..., Recipe], data: Path
) -> None:
    collator = open_session(make_recipe(), []).collator
    collator.max_length = 8
    rows = NumberedRows(rows_of(data, 3))
    with pytest.raises(UserError, match=r"train\.json, line \d+, row 2 \(from 0\) \(task"):
        NamingCollator(collator)([rows[2]])
    plain = NumberedRows([{name: value for name, value in row.items() if name != "origin"} for row in rows.rows])  # type: ignore[misc]
    with pytest.raises(UserError, match=r"sample 2 \(task"):
        NamingCollator(collator)([plain[2]])


def test_a_sample_is_named_by_its_question_and_not_by_what_a_system_says(
    make_recipe: Callable[..., Recipe], data: Path
) -> None:
    [row] = rows_of(data, 1)
    said = {**row, "turns": [{"role": "system", "text": "Be terse."}, *row["turns"]]}
    names = NamingCollator(open_session(make_recipe(), []).collator)([row, said])[SAMPLES]
    question = words(row["turns"][0]["text"])
    for name in names:
        assert f"task {row['task']}: {question!r})" in name and name.endswith(f" with {row['images'][0]['path']}")
