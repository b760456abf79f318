"""Callbacks of a run: the metrics and the progress that it shows, and the guard of its first steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.files import read_log
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from qmixlora.training import callbacks, make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay

from .helpers import QUIET, rows_of


@pytest.fixture
def evaluated(make_recipe: Callable[..., Recipe], data: Path) -> Recipe:
    return make_recipe(data={"validation": str(data / "validation.json")}, train={"eval_every": 2})


def test_every_log_and_evaluation_is_a_record(evaluated: Recipe) -> None:
    folder = train(evaluated, console=QUIET)
    records = read_log(folder / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]
    assert all({"seconds", "memory_gib"} <= r.keys() for r in records)


def test_progress_shows_what_a_user_waits_for(evaluated: Recipe) -> None:
    screen = io.StringIO()
    train(evaluated, console=Console(file=screen, width=120))
    for word in ("step", "loss", "lr", "samples/s", "GiB", "left", "validation loss"):
        assert word in screen.getvalue()


def test_every_record_says_from_which_step_its_start_went_on(make_recipe: Callable[..., Recipe]) -> None:
    """Its seconds count from there."""
    folder = train(make_recipe(train={"max_steps": 2}), console=QUIET)
    train(make_recipe(train={"max_steps": 4}), resume=True, console=QUIET)
    records = read_log(folder / "metrics.jsonl")
    assert [(one["step"], one["start"]) for one in records if "loss" in one] == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_the_speed_that_is_shown_leaves_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the report's does; the time that is left has it."""
    screen, now = io.StringIO(), [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    display, state = ProgressDisplay(Console(file=screen, width=200)), SimpleNamespace(global_step=0, max_steps=20)
    display.on_train_begin(None, state, None)
    now[0], state.global_step = 30.0, 10
    display.on_log(None, state, None, {"eval_loss": 1.0, "eval_runtime": 20.0})
    display.on_log(None, state, None, {"loss": 1.0, "learning_rate": 1e-3, "samples": 40})
    assert "4 samples/s" in screen.getvalue() and "30 s left" in screen.getvalue()


def test_the_guard_stops_a_tensor_without_gradient(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    extra = torch.nn.Parameter(torch.zeros(3))
    session.model.base_model.model.model.language_model.layers[0].self_attn.q_proj.mixlora_A["unused"] = extra
    trainer = make_trainer(
        session, load_conversations(str(data / "train.json")), None, tmp_path, ProgressDisplay(QUIET)
    )
    with pytest.raises(UserError, match=r"1 of the trainable tensors had no gradient in the first 3 steps"):
        trainer.train()


def train_head(session: TunedSession) -> None:
    session.backbone.lm_head.weight.requires_grad_(True)


def train_in_bf16(session: TunedSession) -> None:
    for name, parameter in session.model.named_parameters():
        if "mixlora_A" in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def unquantize(session: TunedSession) -> None:
    layer = session.backbone.model.language_model.layers[0].mlp.up_proj
    layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (train_head, "lm_head.weight is trainable"),
        (train_in_bf16, "not in fp32"),
        (unquantize, "not NF4"),
    ],
)
def test_the_guard_stops_what_the_recipe_does_not_declare(
    make_recipe: Callable[..., Recipe],
    data: Path,
    tmp_path: Path,
    break_it: Callable[[TunedSession], None],
    message: str,
) -> None:
    session = open_session(make_recipe(), [])
    break_it(session)
    trainer = make_trainer(session, rows_of(data, 8), None, tmp_path, ProgressDisplay(QUIET))
    with pytest.raises(UserError, match=message):
        trainer.train()
