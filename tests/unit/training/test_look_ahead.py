"""No answer is visible while it is learned, or the run does not begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qmixlora.data import load_split
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from qmixlora.training import run, train
from qmixlora.training.look_ahead import check_look_ahead

from .helpers import QUIET


def test_a_causal_decoder_passes(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    check_look_ahead(open_session(recipe, ["a"]), load_split(recipe.data, "train")[0])


def test_an_answer_that_is_visible_ends_the_run_before_its_first_step(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opened(recipe: Recipe, tasks: list[str]) -> TunedSession:
        session = open_session(recipe, tasks)

        def look_ahead(module: nn.Module, args: Any, output: Any) -> Any:
            return output + output.mean(dim=1, keepdim=True)

        session.backbone.get_input_embeddings().register_forward_hook(look_ahead)
        return session

    monkeypatch.setattr(run, "open_session", opened)
    with pytest.raises(UserError, match="reads a token of the answer before it has to predict it"):
        train(make_recipe(), console=QUIET)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_as_many_logits_are_compared_at_a_time_as_training_makes(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"loss_chunk": 1})
    session, sizes = open_session(recipe, ["a"]), list[int]()
    head = session.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[:-1].numel()))
    check_look_ahead(session, load_split(recipe.data, "train")[0])
    assert set(sizes) == {1} and len(sizes) > 2
