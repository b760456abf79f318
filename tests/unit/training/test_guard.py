"""The guard of the first steps judges by steps in which a tensor could have had a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.session import open_session
from qmixlora.training import make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay

from .helpers import QUIET, rows_of

WriteJson = Callable[[str, Any], Path]


@pytest.fixture
def chats(write_json: WriteJson, data: Path) -> Callable[[int, int], Path]:
    """A data set of so many samples, of which the last ones have an image."""
    images = [str(path) for path in sorted((data / "images").glob("train-*.png"))]

    def made(count: int, with_image: int) -> Path:
        rows = []
        for index in range(count):
            mark = {"image": images[index]} if index >= count - with_image else {}
            asked = f"{'<image>' if mark else ''} what digit is written ?"
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": ["one", "two", "red"][index % 3]}]
            rows.append({**mark, "task": "digit", "conversations": turns})
        return write_json("chats.json", rows)

    return made


def test_a_run_whose_first_steps_have_no_picture_is_not_stopped(
    make_recipe: Callable[..., Recipe], chats: Callable[[int, int], Path]
) -> None:
    spec = {"micro_batch_size": 1, "max_steps": 8}
    train(make_recipe(data={"train": str(chats(12, 1)), "allow_outside": True}, train=spec), console=QUIET)


def test_a_resumed_run_counts_its_own_steps(
    make_recipe: Callable[..., Recipe], chats: Callable[[int, int], Path]
) -> None:
    recipe = make_recipe(
        data={"train": str(chats(12, 2)), "allow_outside": True},
        train={"micro_batch_size": 1, "max_steps": 4, "epochs": 9},
    )
    train(recipe, console=QUIET)
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 7})})
    train(longer, resume=True, console=QUIET)


def test_equal_questions_leave_routers_without_gradient_and_are_no_mistake(
    make_recipe: Callable[..., Recipe], chats: Callable[[int, int], Path]
) -> None:
    """Routed on nothing but equal instructions, whose centred condition is zero."""
    recipe = make_recipe(
        adapter={"task_mix": 0.9, "projector": "frozen"},
        data={"train": str(chats(8, 0))},
        train={"micro_batch_size": 1, "max_steps": 24, "epochs": 3},
    )
    train(recipe, console=QUIET)


def test_a_projector_without_any_picture_is_told_before_the_first_step(
    make_recipe: Callable[..., Recipe], chats: Callable[[int, int], Path]
) -> None:
    recipe = make_recipe(data={"train": str(chats(5, 0))})
    with pytest.raises(UserError, match=r"None of the 5 samples has an image[\s\S]*adapter.projector=frozen"):
        train(recipe, console=QUIET)
    assert not Path(recipe.train.output).exists()


def test_a_projector_that_gets_no_gradient_from_pictures_stops_the_run(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])
    rows = load_conversations(str(data / "train.json"))
    trainer = make_trainer(session, rows, None, tmp_path, ProgressDisplay(QUIET))
    session.backbone.model.multi_modal_projector.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match=r"trainable tensors had no gradient in the first 3 steps"):
        trainer.train()


def test_the_guard_leaves_no_hook_when_it_is_done(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(), [])

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in session.model.modules())

    before = hooks()
    trainer = make_trainer(session, rows_of(data, 16), None, tmp_path, ProgressDisplay(Console(quiet=True)))
    at_start = hooks()
    trainer.train()
    assert hooks() == at_start >= before
    assert torch.isfinite(next(session.model.parameters())).all()


def test_layers_that_are_kept_in_16_bits_are_trained_on(make_recipe: Callable[..., Recipe]) -> None:
    train(make_recipe(model={"keep": ["o_proj"]}, train={"max_steps": 1}), console=QUIET)
