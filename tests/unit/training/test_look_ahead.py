"""No answer is visible while it is learned, or the run does not begin."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from torch import nn

from qmixlora.data import load_split
from qmixlora.data.reading.store import FEATURES
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from qmixlora.training import run, train
from qmixlora.training.look_ahead import check_look_ahead
from tests.families.case import Case
from tests.families.variant import variants

from .helpers import QUIET


def test_a_causal_decoder_passes(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    check_look_ahead(open_session(recipe, ["a"]), load_split(recipe.data, "train"))


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


def shown_later(recipe: Recipe) -> Dataset:
    """A conversation with a picture in each of two questions, behind rows of one."""
    row = load_split(recipe.data, "train")[0]
    turns = [{**turn, "text": turn["text"]} for turn in (*row["turns"], *row["turns"])]
    images = [row["images"][0], {"path": "other.png", "bytes": png((40, 24))}]
    return Dataset.from_list([row, {**row, "turns": turns, "images": images}], features=FEATURES)


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("name", "is_refused"), [("qwen3_vl", False), ("llava_onevision", True), ("molmo2", True)])
def test_a_picture_in_a_later_question_that_changes_what_stands_before_it_is_refused(
    tmp_path: Path, name: str, is_refused: bool
) -> None:
    """The tokens of the picture before it (LLaVA-OneVision), or states (Molmo2)."""
    case = Case(variants()[name], tmp_path)
    with pytest.raises(UserError, match="a picture in a later question") if is_refused else nullcontext():
        check_look_ahead(case.session, shown_later(case.recipe()))


def test_as_many_logits_are_compared_at_a_time_as_training_makes(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"loss_chunk": 1})
    session, sizes = open_session(recipe, ["a"]), list[int]()
    head = session.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[:-1].numel()))
    check_look_ahead(session, load_split(recipe.data, "train"))
    assert set(sizes) == {1} and len(sizes) > 2
