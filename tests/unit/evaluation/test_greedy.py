"""Answers are plain greedy, and stop where the run's answers end, whatever the checkpoint says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from qmixlora.data import load_split
from qmixlora.evaluation import answer_rows, stop_ids
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from tests.adapters import randomize

DECODING = [
    {"repetition_penalty": 50.0},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 50.0, "top_k": 0},
    {"num_beams": 4, "length_penalty": -9.0},
    {"suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], "forced_eos_token_id": 2},
]


@pytest.fixture
def opened(make_recipe: Callable[..., Recipe], backbone: Path, tmp_path: Path) -> Callable[..., Session]:
    """A session on a checkpoint with this generation config, and with another chat template if one is given."""

    def open_with(generation: dict[str, Any], template: Callable[[str], str] = str) -> Session:
        folder = Path(shutil.copytree(backbone, tmp_path / "backbone", dirs_exist_ok=True))
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        file = folder / "chat_template.jinja"
        file.write_text(template(file.read_text(encoding="utf-8")), encoding="utf-8")
        recipe = make_recipe(model={"id": str(folder)}, train={"max_new_tokens": 6})
        session = open_session(recipe, [])
        randomize(session.model, "mixlora_B", std=0.2, seed=0)
        return session

    return open_with


@pytest.fixture
def rows(make_recipe: Callable[..., Recipe]) -> Dataset:
    return load_split(make_recipe().data, "test").select(range(8))


@pytest.mark.parametrize("decoding", DECODING, ids=lambda decoding: next(iter(decoding)))
def test_a_checkpoints_way_of_decoding_changes_no_answer(
    opened: Callable[..., Session], rows: Dataset, decoding: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    plain = answer_rows(opened({"eos_token_id": 2}), rows)
    assert answer_rows(opened({"eos_token_id": 2, **decoding}), rows) == plain


def test_the_checkpoint_keeps_its_own_config(opened: Callable[..., Session], rows: Dataset) -> None:
    session = opened({"eos_token_id": 2, "repetition_penalty": 3.0})
    answer_rows(session, rows)
    assert session.backbone.generation_config.repetition_penalty == 3.0


def test_generation_stops_where_the_template_ends_answers_and_where_the_checkpoint_does(
    opened: Callable[..., Session],
) -> None:
    session = opened({"eos_token_id": [2, 7]}, lambda template: template.replace("<eos>", "<unk>"))
    assert stop_ids(session) == [2, 4, 7]  # <eos>, <unk>, the checkpoint's


def test_an_answer_goes_up_to_its_first_end(opened: Callable[..., Session]) -> None:
    collator = opened({"eos_token_id": 2}).collator
    red, blue = collator.processor.tokenizer.convert_tokens_to_ids(["red", "blue"])  # type: ignore[attr-defined]
    assert collator.decode(torch.tensor([[red, 2, blue, 0], [red, blue, 2, 0]])) == ["red", "red blue"]
