"""A run that is asked to stop finishes its step, keeps it, and goes on later as if it had never stopped."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.errors import UserError
from qmixlora.interrupts import Interrupted, Requests, raised
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession
from qmixlora.training import SupervisedTrainer, run, train
from qmixlora.training.stopping import TimeIsUpError

from .card import NOISY, records, weights
from .helpers import QUIET

SPEC = {"max_steps": 6, "save_every": 2, "micro_batch_size": 2, "gradient_accumulation": 2}


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send this process signals in the forward passes with these numbers, in training or in evaluation."""
    open_session = run.open_session

    def send(number: int | None, *passes: int, training: bool = True, times: int = 1) -> None:
        def opened(recipe: Recipe, tasks: list[str]) -> TunedSession:
            session, counted = open_session(recipe, tasks), iter(range(1, 9999))
            monkeypatch.setattr(run, "check_look_ahead", lambda *_: None)  # evaluates before the first step

            def note(module: Any, args: Any) -> None:
                if number is not None and module.training is training and next(counted) in passes:
                    for _ in range(times):
                        os.kill(os.getpid(), number)

            session.backbone.model.language_model.norm.register_forward_pre_hook(note)
            return session

        monkeypatch.setattr(run, "open_session", opened)

    return send


def same(folder: Path, other: Path) -> bool:
    own, expected = weights(folder), weights(other)
    return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long),
    ],
)
def test_a_signal_finishes_the_step_and_keeps_it(
    make_recipe: Callable[..., Recipe], signalled: Callable[..., None], tmp_path: Path, number: int, code: int
) -> None:
    straight = train(make_recipe(adapter=NOISY, train={**SPEC, "output": str(tmp_path / "straight")}), console=QUIET)
    signalled(number, 5)  # in the first micro-batch of the third step
    recipe = make_recipe(adapter=NOISY, train=SPEC)
    folder = Path(recipe.train.output)
    with pytest.raises(Interrupted) as end:
        train(recipe, console=QUIET)
    assert end.value.exit_code == code
    for words in ("3 of 6 steps are done", f"qmixlora train {folder} --resume"):
        assert words in str(end.value)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert [record["step"] for record in records(folder)] == [1, 2, 3]
    signalled(None)
    assert same(train(recipe, resume=True, console=QUIET), straight)


@pytest.mark.long
def test_a_second_signal_stops_at_once_and_loses_nothing_older(
    make_recipe: Callable[..., Recipe], signalled: Callable[..., None], tmp_path: Path
) -> None:
    straight = train(make_recipe(train={**SPEC, "output": str(tmp_path / "straight")}), console=QUIET)
    signalled(signal.SIGINT, 5, times=2)
    recipe = make_recipe(train=SPEC)
    with pytest.raises(Interrupted, match="not finished"):
        train(recipe, console=QUIET)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    signalled(None)
    assert same(train(recipe, resume=True, console=QUIET), straight)


@pytest.mark.long
def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(
    make_recipe: Callable[..., Recipe], signalled: Callable[..., None], data: Path, tmp_path: Path
) -> None:
    spec = {**SPEC, "eval_every": 2, "eval_batch_size": 2}
    validation = {"validation": str(data / "validation.json")}
    straight = train(make_recipe(data=validation, train={**spec, "output": str(tmp_path / "a")}), console=QUIET)
    signalled(signal.SIGTERM, 2, training=False)
    recipe = make_recipe(data=validation, train=spec)
    with pytest.raises(Interrupted):
        train(recipe, console=QUIET)
    signalled(None)
    folder = train(recipe, resume=True, console=QUIET)
    assert same(folder, straight)
    losses, expected = (
        [(r["step"], r["eval_loss"]) for r in records(where) if "eval_loss" in r] for where in (folder, straight)
    )
    assert losses == expected and len(losses) == 3


def test_time_that_is_over_stops_a_run_as_it_was_asked(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(train={**SPEC, "max_steps": 100_000, "epochs": 1, "max_minutes": 1e-3, "save_every": None})
    with pytest.raises(TimeIsUpError, match=r"of 100000 steps are done[\s\S]*--resume") as end:
        train(recipe, console=QUIET)
    assert end.value.exit_code == 0 and isinstance(end.value, UserError)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_run_that_was_stopped_before_its_first_step_says_so(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer = run.make_trainer

    def made(*arguments: Any) -> SupervisedTrainer:
        os.kill(os.getpid(), signal.SIGTERM)
        return make_trainer(*arguments)

    monkeypatch.setattr(run, "make_trainer", made)
    with pytest.raises(Interrupted, match="No step was completed"):
        train(make_recipe(), console=QUIET)


def test_signals_raise_where_nothing_is_deferred_and_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as end, raised():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError("reentrant call inside <_io.BufferedWriter>")])
def test_a_request_is_remembered_where_it_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | Exception
) -> None:
    class Unwritable(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    requests = Requests()
    monkeypatch.setattr(sys, "stderr", Unwritable())
    with requests.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    assert requests.number == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As `nohup` asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_leave_ctrl_c_to_their_parent_and_end_when_it_ends_them() -> None:
    requests = Requests()
    with requests.deferred():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM and requests.number is None
