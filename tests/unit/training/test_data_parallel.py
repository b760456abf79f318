"""Several processes learn what one learns with the same effective batch, and end together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from qmixlora import processes, session
from qmixlora.files import read_log
from qmixlora.manifest import first_change
from qmixlora.recipe import Recipe
from qmixlora.training import train, train_within_memory
from qmixlora.training.trainer import SupervisedTrainer
from tests.together import together

from .helpers import QUIET, descend_plainly

MakeRecipe = Callable[..., Recipe]
SPEC = {"max_steps": 1000, "micro_batch_size": 1, "learning_rate": 1.0, "save_every": 2, "log_every": 1}


@pytest.fixture(autouse=True)
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    descend_plainly(monkeypatch)


def in_processes(count: int, recipe: Recipe, **arguments: Any) -> list[Any]:
    """The end of a run in each of so many processes: its folder, or its error."""

    def work(rank: int) -> str:
        return str(train_within_memory(recipe, console=QUIET, **arguments))

    return together(count, work)


def assert_same(folder: Path, other: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "routing.safetensors"):
        if not (other / name).exists():  # lora routes nothing
            continue
        own, expected = load_file(folder / name), load_file(other / name)
        assert own.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(own[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda t, k=key: f"{k}: {t}")


@pytest.fixture
def recipe_for(make_recipe: MakeRecipe, data: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe of an effective batch of 6, of which the data's 60 samples are ten steps; for so many processes."""

    def make(count: int, name: str | None = None, **sections: Any) -> Recipe:
        spec = {**SPEC, "output": str(tmp_path / (name or f"of-{count}")), "gradient_accumulation": 6 // count}
        train_spec = {**spec, **sections.pop("train", {})}
        return make_recipe(train=train_spec, **sections)

    return make


@pytest.mark.parametrize(
    ("count", "adapter", "train_spec", "rows"),
    [
        pytest.param(2, {}, {"max_steps": 3}, 60, id="a centre of all layers"),
        pytest.param(
            3,
            {"route_on": "instruction"},
            {"epochs": 1},
            8,
            marks=pytest.mark.long,
            id="centres by layer, and processes that idle",
        ),
        pytest.param(2, {"method": "lora"}, {"epochs": 2}, 7, marks=pytest.mark.long, id="lora, two short epochs"),
    ],
)
def test_processes_learn_what_one_learns(
    recipe_for: MakeRecipe,
    data: Path,
    count: int,
    adapter: dict[str, Any],
    train_spec: dict[str, Any],
    rows: int,
) -> None:
    part = [{"path": str(data / "train.json"), "samples": rows}]
    sections = {"adapter": adapter, "data": {"train": part, "validation": str(data / "validation.json")}}
    spec = {"max_steps": None, "eval_batch_size": 4, **train_spec}
    alone = train(recipe_for(1, train=spec, **sections), console=QUIET)
    several = recipe_for(count, train=spec, **sections)
    folder = Path(several.train.output)
    assert in_processes(count, several) == [str(folder)] * count
    assert_same(folder, alone)
    logs, expected = read_log(folder / "metrics.jsonl"), read_log(alone / "metrics.jsonl")
    assert [log["step"] for log in logs] == [log["step"] for log in expected]
    for key in ("loss", "grad_norm", "eval_loss", "train_loss"):
        assert [log[key] for log in logs if key in log] == pytest.approx(
            [log[key] for log in expected if key in log], rel=1e-3
        )
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert all(first_change(path) is None for path in (folder, *(folder / "checkpoints").iterdir()))


@pytest.mark.long
def test_a_run_goes_on_in_another_number_of_processes_where_its_batch_is_the_same(
    recipe_for: MakeRecipe, data: Path
) -> None:
    evenly = {"schedule": "constant", "warmup_ratio": 0.0, "save_every": 11}
    last = {**evenly, "max_steps": 13}  # of the second epoch
    alone = train(recipe_for(1, train=last), console=QUIET)
    folder = Path(recipe_for(2, "moved").train.output)
    assert in_processes(2, recipe_for(2, "moved", train={**evenly, "max_steps": 11})) == [str(folder)] * 2
    refused = in_processes(3, recipe_for(2, "moved", train=last), resume=True)
    assert "processes: 2 -> 3" in refused[0][1] and [end for end, _ in refused[1:]] == ["EndedElsewhere"] * 2
    assert in_processes(3, recipe_for(3, "moved", train=last), resume=True) == [str(folder)] * 3
    assert_same(folder, alone)
    starts = [record["processes"] for record in read_log(folder / "history.jsonl") if "processes" in record]
    assert starts == [2, 3]


def interfering(monkeypatch: pytest.MonkeyPatch, rank: int, step: int, act: Callable[[], float | None]) -> None:
    """Have something happen in one process, in the first micro-batch of a step, and its loss be multiplied."""
    compute_loss = SupervisedTrainer.compute_loss

    def loss(trainer: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        ours = processes.rank() == rank and trainer.state.global_step == step - 1 and not trainer.steps.batches
        return compute_loss(trainer, *args, **kwargs) * ((ours and act()) or 1)

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", loss)


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_after_a_step_that_is_kept(
    recipe_for: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(2, train={"max_steps": 5})
    alone = train(recipe_for(1, train={"max_steps": 5}), console=QUIET)
    with monkeypatch.context() as patch:
        interfering(patch, 1, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        ends = in_processes(2, recipe)
    assert [end for end, _ in ends] == ["Interrupted"] * 2 and all("3 of 5 steps are done" in text for _, text in ends)
    assert in_processes(2, recipe, resume=True) == [recipe.train.output] * 2
    assert_same(Path(recipe.train.output), alone)


def test_time_that_is_over_stops_all_processes(recipe_for: MakeRecipe) -> None:
    ends = in_processes(2, recipe_for(2, train={"max_minutes": 1e-3}))
    assert [end for end, _ in ends] == ["TimeIsUpError"] * 2


@pytest.mark.long
def test_memory_that_runs_out_in_one_process_is_adapted_to_by_all(
    recipe_for: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out() -> None:
        if not Path(recipe.train.output, "ran-out").exists():
            Path(recipe.train.output, "ran-out").touch()
            raise torch.OutOfMemoryError("CUDA out of memory")

    spec = {"max_steps": 4, "micro_batch_size": 3, "gradient_accumulation": 1}
    recipe = recipe_for(2, train=spec)
    alone = train(recipe_for(1, train={**spec, "gradient_accumulation": 2}), console=QUIET)
    interfering(monkeypatch, 1, 3, run_out)
    assert in_processes(2, recipe) == [recipe.train.output] * 2
    assert_same(Path(recipe.train.output), alone)
    (adapted,) = [log for log in read_log(Path(recipe.train.output) / "metrics.jsonl") if "out_of_memory" in log]
    assert adapted["step"] == 2 and adapted["changed"]["train.micro_batch_size"] < 3


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_step_that_is_not_finite_in_one_process_is_taken_by_none(
    recipe_for: MakeRecipe, monkeypatch: pytest.MonkeyPatch, on_nan: str
) -> None:
    interfering(monkeypatch, 1, 2, lambda: float("nan"))
    recipe = recipe_for(2, train={"max_steps": 3, "on_nan": on_nan, "gradient_accumulation": 1})
    ends = in_processes(2, recipe)
    logs = read_log(Path(recipe.train.output) / "metrics.jsonl")
    if on_nan == "stop":
        assert [end for end, _ in ends] == ["NotFiniteError"] * 2 and " (task " in ends[0][1]
        assert ends[0] == ends[1]
    else:
        assert ends == [recipe.train.output] * 2
        assert len([log for log in logs if "skipped" in log]) == 1


def test_means_of_tasks_are_refused_by_name(recipe_for: MakeRecipe) -> None:
    ends = in_processes(2, recipe_for(2, adapter={"task_mix": 0.5}))
    assert all("adapter.task_mix: 0.5, 2 processes" in text for _, text in ends)


def test_an_error_of_one_process_ends_all_and_is_told_once(recipe_for: MakeRecipe, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with processes.joined():
            train(recipe, console=QUIET)

    recipe = recipe_for(2, data={"train": str(tmp_path / "missing.json")})
    ends = together(2, work)
    assert sorted(end for end, _ in ends) == ["EndedElsewhere", "UserError"]
    assert not Path(recipe.train.output).exists()


@pytest.mark.long
def test_frozen_layers_in_shares_learn_what_whole_ones_learn(
    recipe_for: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NF4 and FSDP2 over gloo, activation checkpointing and an evaluation among it."""
    shares: list[tuple[int, int]] = []

    def work(rank: int) -> Any:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        weights = session.shard_layers

        def shard(model: Any, paths: list[str], device: torch.device) -> None:
            weights(model, paths, device)
            own = [p for p in model.get_submodule(paths[0]).parameters() if isinstance(p, DTensor)]
            shares.append((sum(p.to_local().numel() for p in own), sum(p.numel() for p in own)))

        monkeypatch.setattr(session, "shard_layers", shard)
        return train(recipe, console=QUIET), shares

    recipe = recipe_for(2, train={"max_steps": 3})
    alone = train(recipe_for(1, train={"max_steps": 3}), console=QUIET)
    for folder, [(own, whole)] in together(2, work):
        assert folder == Path(recipe.train.output) and 0 < 2 * own == whole
    assert_same(Path(recipe.train.output), alone)


@pytest.mark.parametrize(
    ("facts", "model", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version: 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"offload_embeddings": True}, "offload_embeddings"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "MEGATRON_LM"),
    ],
)
def test_what_accelerate_was_asked_for_in_vain_is_refused_by_name(
    recipe_for: MakeRecipe, facts: dict[str, str], model: dict[str, Any], words: str
) -> None:
    def work(rank: int) -> None:
        os.environ.update(facts)
        train(recipe, console=QUIET)

    recipe = recipe_for(2, model=model)
    assert all(words in text for _, text in together(2, work))
