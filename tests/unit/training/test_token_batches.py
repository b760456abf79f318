"""Micro-batches that are filled by tokens: an epoch holds the same, the loss is a mean over tokens, runs resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.data import lengths_of, load_split
from qmixlora.files import read_log
from qmixlora.loss import supervised_loss
from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation.batch import synthetic_batch, worst_batches
from qmixlora.recipe import Recipe, steps_of
from qmixlora.session import open_session
from qmixlora.training import make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay
from qmixlora.training.sampling import TokenBatchSampler

from .card import assert_equal, resumed_from, weights
from .helpers import QUIET

TOKENS = 128  # of a micro-batch


@pytest.fixture
def by_tokens(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def make(**spec: Any) -> Recipe:
        batch = {"micro_batch_size": 1, "batch_tokens": TOKENS, "eval_every": None}
        return make_recipe(data={"max_length": 64, "validation": None}, train={**batch, **spec})

    return make


def test_batches_of_tokens_hold_every_sample_once_and_epochs_differ() -> None:
    lengths = [1 + index % 37 for index in range(500)]
    sampler = TokenBatchSampler(100, lengths, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert Counter(index for batch in epochs[-1] for index in batch) == Counter(range(500))
        assert len(epochs[-1]) == len(sampler)
        assert all(max(lengths[index] for index in batch) * len(batch) <= 100 for batch in epochs[-1])
        assert 37 in (lengths[index] for index in epochs[-1][0])  # what runs out of memory does so at once
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.long
def test_a_run_by_tokens_resumes_and_logs_its_padding(by_tokens: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = by_tokens(max_steps=8, save_every=6, gradient_accumulation=4, log_every=1)
    plain = train(recipe, console=QUIET)
    assert_equal(weights(resumed_from(plain, 6, recipe, tmp_path / "b")), weights(plain))
    logs = [record for record in read_log(plain / "metrics.jsonl") if "loss" in record]
    rows = load_split(recipe.data, "train")
    session = open_session(recipe, [])
    trainer = make_trainer(session, rows, None, tmp_path / "x", ProgressDisplay(QUIET))
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    assert all(mask.numel() <= TOKENS for mask in masks) and sum(len(mask) for mask in masks) == len(rows)
    assert logs[0]["samples"] == sum(len(mask) for mask in masks[:4])
    share = 1 - sum(int(mask.sum()) for mask in masks[:4]) / sum(mask.numel() for mask in masks[:4])
    assert logs[0]["padding"] == pytest.approx(share)


def test_a_steps_loss_by_tokens_is_the_mean_over_all_its_supervised_tokens(by_tokens: Callable[..., Recipe]) -> None:
    """Micro-batches with different numbers of samples weigh by their tokens, not alike."""
    recipe = by_tokens(max_steps=1, gradient_accumulation=1000, log_every=1, save_every=None)
    rows = load_split(recipe.data, "train")
    session = open_session(recipe, sorted(set(rows["task"])))
    with torch.no_grad():
        whole = supervised_loss(session.model, session.collator([*rows])).item()
    [logged] = [
        record["loss"] for record in read_log(train(recipe, console=QUIET) / "metrics.jsonl") if "loss" in record
    ]
    assert logged == pytest.approx(whole, rel=1e-4)


def test_the_worst_micro_batch_by_tokens_is_planned(by_tokens: Callable[..., Recipe]) -> None:
    recipe = by_tokens()
    config, rows = config_of(recipe.model), load_split(recipe.data, "train")
    lengths = lengths_of(rows, open_session(recipe, []).collator)  # type: ignore[arg-type]
    sampler = TokenBatchSampler(TOKENS, lengths, seed=0)
    most = max(len(batch) * max(lengths[index] for index in batch) for batch in sampler)
    assert max(batch.inputs["input_ids"].numel() for batch in worst_batches(recipe, config)) == most
    assert synthetic_batch(config, recipe, 32).inputs["input_ids"].shape == (4, 32)


def test_steps_are_counted_by_the_samples_that_a_micro_batch_has(by_tokens: Callable[..., Recipe]) -> None:
    assert steps_of(by_tokens(max_steps=None, gradient_accumulation=2, epochs=3), 100, 2.5) == 60
