"""A recipe that is made for a model, its data and a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qmixlora.errors import UserError
from qmixlora.memory.architectures import config_of
from qmixlora.memory.commented import text_of, words_of
from qmixlora.memory.evaluation import plan_evaluation
from qmixlora.memory.planner import MARGIN
from qmixlora.memory.proposal import Proposal, propose
from qmixlora.memory.residuals import remember
from qmixlora.recipe import Train, edited, validate

CARD = 2 * 2**30


@pytest.fixture(scope="module")
def proposed(backbone: Path, data: Path) -> Callable[..., Proposal]:
    def make(prefer: str = "speed", *overrides: str, card: int = CARD) -> Proposal:
        settled = ["model.dtype=float32", *overrides]
        return propose(str(backbone), str(data / "train.json"), card, prefer, "runs/own", settled)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def fast(proposed: Callable[..., Proposal]) -> Proposal:
    return proposed("speed", "adapter.r=2")


def test_a_proposal_fits_its_card_and_its_data(fast: Proposal) -> None:
    assert fast.plan.fits and fast.data.samples == 60
    assert fast.recipe.data.max_length >= fast.data.longest > fast.recipe.data.max_length - 64
    spec = fast.recipe.train
    assert spec.micro_batch_size > 1 and not spec.checkpointing.enabled  # there is room for what is fastest
    assert fast.recipe.adapter.r == 2  # what is settled stays


def test_a_small_data_set_is_logged_and_saved_in_time(fast: Proposal) -> None:
    spec = fast.recipe.train
    assert fast.recipe.data.validation and spec.eval_every is not None and spec.save_every is not None
    assert spec.epochs > 1 and fast.steps / 100 <= spec.log_every < fast.steps / 20
    assert spec.eval_every <= fast.steps // 2 and spec.save_every <= fast.steps // 2


def test_answers_may_be_generated_as_long_as_the_longest(backbone: Path, tmp_path: Path, fast: Proposal) -> None:
    rows = [{"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red " * 50}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 4), encoding="utf-8")
    made = propose(str(backbone), str(tmp_path / "rows.json"), CARD, "speed", "runs/own", ["model.dtype=float32"])
    assert made.recipe.train.max_new_tokens == made.data.longest_answer > 50
    assert "the longest answer" in made.reasons["train.max_new_tokens"]
    assert fast.recipe.train.max_new_tokens == Train().max_new_tokens > fast.data.longest_answer  # never lowered


def test_the_file_is_the_recipe_with_the_reasons(fast: Proposal) -> None:
    text = text_of(fast, "a card")
    assert validate(yaml.safe_load(text), "new") == fast.recipe
    assert f"# the longest sample has {fast.data.longest} tokens" in text and "Predicted peak" in text
    words = "\n".join(words_of(fast, config_of(fast.recipe.model), "rtx3090-24gb"))
    assert all(reason in words for reason in fast.reasons.values())
    assert "An epoch takes about" in words and "optimiser steps" in words


def test_metrics_of_tasks_with_dots_in_their_names_are_in_the_file(fast: Proposal) -> None:
    settled = edited(fast.recipe, ["data.metrics={vqa.v2: exact, '*': f1}"])
    made = validate(yaml.safe_load(text_of(replace(fast, recipe=settled), "a card")), "new")
    assert made.data.metrics == {"vqa.v2": "exact", "*": "f1"} and made == settled


def test_texts_of_several_columns_are_put_together_and_what_is_not_used_is_said(backbone: Path, tmp_path: Path) -> None:
    row = {"id": 7, "question": "who ?", "context": "ann is here", "choices": ["ann", "bo"], "answer": 0}
    (tmp_path / "table.json").write_text(json.dumps([row] * 8))
    made = propose(str(backbone), str(tmp_path / "table.json"), CARD, "speed", "runs/own", ["model.dtype=float32"])
    text = text_of(made, "a card")
    assert yaml.safe_load(text)["data"]["template"] == "{context}\n{question}\n{options}"
    assert validate(yaml.safe_load(text), "new") == made.recipe and made.data.left_out == 0
    said = [text, "\n".join(words_of(made, config_of(made.recipe.model), None))]
    assert all("Columns that are not used: 'id' (" in one for one in said)


def test_samples_are_left_out_unasked_only_where_they_are_few(backbone: Path, tmp_path: Path) -> None:
    def made(bad: int, *settled: str) -> Proposal:
        rows = [{"question": f"what ? {index}", "answer": None if index < bad else "red"} for index in range(20)]
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        settled = ("model.dtype=float32", *settled)
        return propose(str(backbone), str(tmp_path / "rows.json"), CARD, "speed", "runs/own", settled)

    few = made(1)
    assert few.recipe.data.on_bad_sample == "skip"
    assert few.reasons["data.on_bad_sample"].startswith("1 of 20 cannot be used")
    with pytest.raises(UserError, match=r"5 samples cannot be used(?s:.*)on_bad_sample: skip"):
        made(5)
    assert made(5, "data.on_bad_sample=skip").data.left_out == 5


def test_what_is_doubtful_in_the_data_is_said(backbone: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what ? {index}", "answer": float(index)} for index in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    made = propose(str(backbone), str(tmp_path / "rows.json"), CARD, "speed", "runs/own", ["model.dtype=float32"])
    words = words_of(made, config_of(made.recipe.model), None)
    assert any(line.startswith("data.train: 4 answers are whole numbers written as decimals") for line in words)


def test_what_is_left_out_is_said_once(backbone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All tries are planned with the same rows, some of them in processes of their own."""
    rows = [{"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]}] * 11
    (tmp_path / "some.json").write_text(json.dumps([*rows, {"messages": []}]), encoding="utf-8")
    made = propose(str(backbone), str(tmp_path / "some.json"), CARD, "speed", "runs/own", ["model.dtype=float32"])
    assert made.data.left_out == 1 and capfd.readouterr().err.count("1 of 12 samples left out") == 1


def test_the_batch_of_small_data_is_limited_by_the_data(fast: Proposal, proposed: Callable[..., Proposal]) -> None:
    assert fast.recipe.train.micro_batch_size == 4  # of 60, at most an eighth
    assert fast.reasons["train.micro_batch_size"].startswith("of 60 samples no more at a time")
    two = proposed("speed", "train.micro_batch_size=2")
    assert two.reasons["train.micro_batch_size"] == "as many at a time as fit with margin"


def test_evaluation_of_what_is_proposed_fits_the_card_too(backbone: Path, tmp_path: Path) -> None:
    """Answers of many tokens have long caches."""
    rows = [{"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red " * 4000}]}]
    (tmp_path / "long.json").write_text(json.dumps(rows * 4), encoding="utf-8")

    def made(card: int, *overrides: str) -> Proposal:
        settled = ["model.dtype=float32", *overrides]
        return propose(str(backbone), str(tmp_path / "long.json"), card, "memory", "runs/own", settled)

    roomy = made(8 * 2**30)
    eight, training = plan_evaluation(roomy.recipe).peak, roomy.plan.peak_with_loading
    assert roomy.recipe.train.eval_batch_size == 8 and eight > training
    card = int((eight + training) / 2 / (1 - MARGIN))
    small, settled = made(card), made(card, "train.eval_batch_size=8")
    fewer = small.recipe.train.eval_batch_size
    assert 1 <= fewer < 8 and plan_evaluation(small.recipe, card=card).fits
    assert settled.recipe.train.eval_batch_size == 8  # it stays, and is told
    assert f"of {fewer} at a time fits" in settled.reasons["train.eval_batch_size"]


def test_the_least_memory_is_that_of_one_sample_with_checkpointing(
    proposed: Callable[..., Proposal], fast: Proposal
) -> None:
    small = proposed("memory")
    assert small.recipe.train.micro_batch_size == 1 and small.recipe.train.checkpointing.enabled
    saved = "forward, after the last layer"  # the optimiser's own step, the same of both, is this model's peak
    assert small.plan.phases[saved] < fast.plan.phases[saved]


def test_a_proposal_counts_what_probes_found_missing(
    proposed: Callable[..., Proposal], backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a card")
    remember("a card", str(backbone), 2**28)
    assert proposed("memory").plan.parts.missed == 2**28


@pytest.mark.long
def test_a_card_that_nothing_fits_is_refused_with_what_to_do(proposed: Callable[..., Proposal]) -> None:
    with pytest.raises(UserError, match="No set of levers was found") as caught:
        proposed("quality", card=2**28)
    assert "a larger card" in str(caught.value)


@pytest.mark.long
def test_a_model_that_is_not_here_is_estimated_and_levers_are_pulled_for_a_small_card(data: Path) -> None:
    """What changes nothing of what is learned is enough on 5 GB; the next larger card is told."""
    model, rows = "llava-hf/llava-1.5-7b-hf", str(data / "train.json")
    small = propose(model, rows, 5 * 2**30, "speed", "runs/own")
    assert small.data.estimated and small.data.image_tokens == 576 and small.plan.fits
    needed = [path for path, reason in small.reasons.items() if "needed for this card" in reason]
    assert needed and all("stays the same" in small.reasons[path] for path in needed)
    assert small.larger_card is not None and "6 GB" in small.larger_card
