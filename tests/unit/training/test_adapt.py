"""Out of memory: the run goes on from its last good step, as a run with the edited recipe would have."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import Session
from qmixlora.training import run as training
from qmixlora.training import train, train_within_memory
from qmixlora.training.recovery import is_out_of_memory

QUIET = Console(file=io.StringIO())
SECOND = 0  # a seed with which sample 0 of 32 comes in the second half
NOISY = {"dropout": 0.1, "task_mix": 0.5}  # whatever draws random numbers and keeps means


class Card:
    """A card that is too small now and then: hooks on the real models that sessions open.

    `fails(step, rows, training)` is asked before every forward pass. `steps` are the samples (their first tokens) of
    every finished optimiser step, and `rates` its learning rate.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: Callable[[int, int, bool], bool] = lambda step, rows, training: False
        self.steps: dict[int, list[Any]] = {}
        self.rates: dict[int, float] = {}
        self.models: list[weakref.ref[Any]] = []
        self.alive: list[int] = []
        self.step, self.seen = 0, list[Any]()
        open_session, fit = training.open_session, training.SupervisedTrainer.train

        def opened(recipe: Recipe, tasks: list[str]) -> Session:
            gc.collect()
            self.alive.append(sum(model() is not None for model in self.models))
            session = open_session(recipe, tasks)
            self.models.append(weakref.ref(session.model))
            # after the vision tower and the first layer: the step is well under way
            last = session.model.get_base_model().model.language_model.layers[1]
            session.model.register_forward_pre_hook(self._look, with_kwargs=True)
            last.register_forward_pre_hook(self._enter)
            return session

        def watched(trainer: Any, **arguments: Any) -> Any:
            self.trainer = weakref.ref(trainer)
            return fit(trainer, **arguments)

        monkeypatch.setattr(training, "open_session", opened)
        monkeypatch.setattr(training.SupervisedTrainer, "train", watched)

    def _look(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        trainer = self.trainer()
        step = trainer.state.global_step + 1
        if model.training:
            if step != self.step or trainer.model is not model:
                self.step = step
            if all(p.grad is None for p in model.parameters()):
                self.seen = []
            self.seen += [ids[ids != 0].tolist() for ids in kwargs["input_ids"]]
            self.steps[step] = list(self.seen)
            self.rates[step] = trainer.lr_scheduler.get_last_lr()[0]

    def _enter(self, layer: Any, args: Any) -> None:
        step = self.trainer().state.global_step + layer.training
        if self.fails(step, len(args[0]), layer.training):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def resumed_from(folder: Path, step: int, recipe: Recipe, output: Path) -> Path:
    """The run that goes on from an ordinary checkpoint of another one, with an edited recipe."""
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "checkpoints" / f"checkpoint-{step}", output / "checkpoints" / f"checkpoint-{step}")
    spec = recipe.train.model_copy(update={"output": str(output)})
    return train(recipe.model_copy(update={"train": spec}), resume=True, console=QUIET)


@pytest.mark.parametrize("step", [3, 5])  # 4 steps are an epoch: within the first, and the first of the second
def test_going_on_equals_a_run_with_the_edited_recipe_from_there(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, step: int
) -> None:
    spec = {"max_steps": 7, "micro_batch_size": 8, "gradient_accumulation": 2, "save_every": 1, "keep_checkpoints": 9}
    plain = train(make_recipe(adapter=NOISY, train={**spec, "output": str(tmp_path / "plain")}), console=QUIET)
    order, rates = dict(card.steps), dict(card.rates)
    assert len(order) == 7 and len(order[1]) == 16 and len(order[4]) == 60 - 3 * 16
    edited = make_recipe(adapter=NOISY, train={**spec, "micro_batch_size": 4, "gradient_accumulation": 4})
    expected = resumed_from(plain, step - 1, edited, tmp_path / "expected")

    card.steps.clear()
    calls = iter(range(99))
    card.fails = lambda now, rows, training: now == step and rows == 8 and next(calls) == 1  # in the second micro-batch
    recipe = make_recipe(adapter=NOISY, train={**spec, "save_every": None, "output": str(tmp_path / "run")})
    folder = train_within_memory(recipe, console=QUIET)
    assert card.steps == order and card.rates == rates
    assert_equal(weights(folder), weights(expected))
    own, other = (load_file(f / "routing.safetensors") for f in (folder, expected))
    assert own.keys() == other.keys()
    for name, tensor in other.items():  # no sample of the failed step counts twice
        torch.testing.assert_close(own[name], tensor)
    assert card.alive[-1] == 0  # nothing of the failed attempt is in memory when the next one loads its model


def test_what_was_changed_is_told_and_written(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, data: Path
) -> None:
    card.fails = lambda step, rows, training: rows > (2 if training else 3)
    screen = io.StringIO()
    recipe = make_recipe(
        data={"validation": str(data / "validation.json")},
        train={"micro_batch_size": 6, "gradient_accumulation": 3, "eval_every": 2},
    )
    folder = train_within_memory(recipe, console=Console(file=screen, width=200))
    text = screen.getvalue()
    first = "train.micro_batch_size=3 train.gradient_accumulation=6"
    second = "train.micro_batch_size=1 train.gradient_accumulation=18"
    assert text.index(first) < text.index(second) < text.index("train.eval_batch_size=4")
    assert text.index("train.eval_batch_size=4") < text.index("train.eval_batch_size=2") < text.index("write into")
    assert "Starting again" in text and "Going on from step 2" in text
    lines = yaml.safe_load(text[text.index("train:\n") :].partition("\nor give")[0])
    changes = {"micro_batch_size": 1, "gradient_accumulation": 18, "eval_batch_size": 2}
    assert lines == {"train": changes}
    as_run = load_recipe(str(folder / "recipe.yaml")).train
    assert as_run.model_dump() == {**recipe.train.model_dump(), **changes}
    found = [record for record in records(folder) if "out_of_memory" in record]
    assert [(r["step"], r["out_of_memory"]) for r in found] == [(0, "training")] * 2 + [(2, "evaluation")] * 2
    assert found[0]["changed"] == {"train.micro_batch_size": 3, "train.gradient_accumulation": 6}


@pytest.mark.parametrize("spec", [{"eval_every": 2, "max_steps": 6}, {"epochs": 2, "max_steps": None}])
def test_an_evaluation_that_ran_out_of_memory_is_made_up_for(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, data: Path, spec: dict[str, Any]
) -> None:
    """Evaluations of 10 samples after steps, the last step among them, and after epochs of 4 steps."""

    def recipe(name: str) -> Recipe:
        batch = {"micro_batch_size": 8, "gradient_accumulation": 2, "output": str(tmp_path / name)}
        return make_recipe(adapter=NOISY, data={"validation": str(data / "validation.json")}, train={**spec, **batch})

    expected = train(recipe("expected"), console=QUIET)
    evaluated = {r["step"]: r["eval_loss"] for r in records(expected) if "eval_loss" in r}
    last = max(evaluated)
    for at in sorted(evaluated):
        card.steps.clear()
        card.fails = lambda step, rows, training, at=at: not training and step == at and rows > 4
        folder = train_within_memory(recipe(f"run-{at}"), console=QUIET)
        found = [(r["step"], r["eval_loss"]) for r in records(folder) if "eval_loss" in r]
        assert [step for step, _ in found] == sorted(evaluated)
        for step, loss in found:
            assert loss == pytest.approx(evaluated[step], rel=0.05)  # a mean over batches, which are smaller now
        assert max(card.steps) == last  # and none beyond
        assert_equal(weights(folder), weights(expected))


def test_an_optimizer_that_ran_out_of_memory_is_not_trusted(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its moments may be of the new step: the run goes on from the checkpoint before."""
    spec = {"max_steps": 6, "micro_batch_size": 8, "gradient_accumulation": 2, "save_every": 2, "keep_checkpoints": 9}
    plain = train(make_recipe(adapter=NOISY, train={**spec, "output": str(tmp_path / "plain")}), console=QUIET)
    edited = make_recipe(adapter=NOISY, train={**spec, "micro_batch_size": 4, "gradient_accumulation": 4})
    expected = resumed_from(plain, 2, edited, tmp_path / "expected")
    step, calls = torch.optim.AdamW.step, iter(range(99))

    def torn(optimizer: Any, *args: Any) -> Any:
        done = step(optimizer, *args)
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    folder = train_within_memory(make_recipe(adapter=NOISY, train=spec), console=QUIET)
    assert [r["step"] for r in records(folder) if "out_of_memory" in r] == [2]
    assert_equal(weights(folder), weights(expected))


def test_levers_after_the_batch(make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card) -> None:
    """The planner's order where it has one; where nothing is left, one message."""
    from qmixlora.training import adapt as ladder

    card.fails = lambda step, rows, training: step == 2
    off = {"micro_batch_size": 1, "checkpointing": {"enabled": False}}
    screen = Console(file=io.StringIO(), width=200)
    with pytest.raises(UserError) as stopped:
        train_within_memory(make_recipe(train=off), console=screen)
    assert "last good step is 1" in str(stopped.value)

    def planned(recipe: Recipe) -> dict[str, Any]:
        edits = ["train.optimizer=paged_adamw_8bit", "train.loss_chunk=64", "train.checkpointing.enabled=true"]
        return {"advice": [{"edit": edit, "saves_gib": 1.0} for edit in edits]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "plan_with_advice", planned)
        with pytest.raises(UserError) as stopped:
            train_within_memory(make_recipe(train={**off, "output": str(tmp_path / "b")}), console=screen)
    message = str(stopped.value)
    assert "Tried: train.loss_chunk=64 train.checkpointing.enabled=true" in message
    assert "new run: train.optimizer=paged_adamw_8bit" in message

    def unknown(recipe: Recipe) -> dict[str, Any]:
        raise UserError("Pictures of such models cannot be planned yet.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "plan_with_advice", unknown)
        with pytest.raises(UserError) as stopped:
            train_within_memory(make_recipe(train={**off, "output": str(tmp_path / "c")}), console=screen)
    assert "Tried: train.checkpointing.enabled=true train.checkpointing.every_n_layers=1" in str(stopped.value)
    assert "train.loss_chunk=32" in str(stopped.value)


def test_stopping_keeps_the_last_step_and_says_what_to_change(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card
) -> None:
    card.fails = lambda step, rows, training: step == 3 and rows > 2
    recipe = make_recipe(train={"on_oom": "stop", "save_every": None})
    with pytest.raises(UserError, match="last good step is 2") as stopped:
        train_within_memory(recipe, console=QUIET)
    assert "--resume and train.micro_batch_size=2 train.gradient_accumulation=2" in str(stopped.value)
    spec = recipe.train.model_copy(update={"micro_batch_size": 2, "gradient_accumulation": 2})
    folder = train_within_memory(recipe.model_copy(update={"train": spec}), resume=True, console=QUIET)
    assert {r["step"] for r in records(folder)} == {1, 2, 3, 4}


def test_a_finished_run_is_not_trained_on(make_recipe: Callable[..., Recipe], card: Card) -> None:
    recipe = make_recipe(train={"save_every": 4})
    before = weights(train(recipe, console=QUIET))
    assert_equal(weights(train(recipe, resume=True, console=QUIET)), before)


MESSAGES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"), True),
    (MemoryError(), True),
    (RuntimeError("CUDA error: device-side assert triggered"), False),
    (RuntimeError("[Errno 28] No space left on device"), False),
    (ValueError("out of memory"), False),
]


@pytest.mark.parametrize(("error", "expected"), MESSAGES)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


LIMITED = """
import resource
import torch
from qmixlora.memory.ladder import train_within_memory  # what a run needs besides its tensors is loaded first
x = torch.ones(1, 300, 300, requires_grad=True)
for work in (lambda: x @ x, lambda: torch.bmm(x, x), x.exp, x.log, x.sin, x.cos, x.tanh, x.erf, x.sigmoid, x.rsqrt):
    work().sum().backward()  # MKL, which ends the process where it cannot load its kernels
with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 500 * 2**20,) * 2)
from qmixlora.cli.main import run
run()
"""


def test_memory_that_really_runs_out(make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> None:
    """A long sample in the second step: attention of 16 x 1,000 x 1,000 and more does not fit in half a GiB."""
    samples = json.loads((data / "train.json").read_text())[:32]
    for sample in samples:
        sample["image"] = str(data / sample["image"])
    samples[0]["conversations"][0]["value"] += " what digit is written ?" * 190
    path = tmp_path / "long.json"
    path.write_text(json.dumps(samples))
    recipe = make_recipe(
        model={"attention": "eager"},
        data={"train": str(path), "max_length": 2048},
        train={"micro_batch_size": 16, "max_steps": 2, "seed": SECOND},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", LIMITED, "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the last good step is 1. Going on from step 1 with train.micro_batch_size=8" in done.stdout
    spec = load_recipe(str(tmp_path / "run" / "recipe.yaml")).train
    assert spec.micro_batch_size < 16 and spec.micro_batch_size * spec.gradient_accumulation == 16
    written = (
        f"train:\n  micro_batch_size: {spec.micro_batch_size}\n  gradient_accumulation: {16 // spec.micro_batch_size}"
    )
    assert written in done.stdout
    assert next(r["step"] for r in records(tmp_path / "run") if "out_of_memory" in r) == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
