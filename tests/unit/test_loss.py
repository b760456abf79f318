"""The loss at supervised positions: that of all positions, with logits nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from qmixlora.errors import UserError
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from tests.unit.training.helpers import gradients, rows_of, warm


@pytest.fixture
def session(make_recipe: Callable[..., Recipe]) -> TunedSession:
    session = open_session(make_recipe(), [])
    warm(session)
    session.model.eval()  # in training, the centre of the conditions moves from step to step
    return session


@pytest.fixture
def batch(session: TunedSession, data: Path) -> dict[str, Any]:
    return session.collator(rows_of(data, 5))


def watch_head(session: TunedSession) -> list[int]:
    """The number of positions in every pass of lm_head from now on."""
    seen: list[int] = []
    session.backbone.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[0] * out.shape[1]))
    return seen


def test_the_loss_of_supervised_tokens_is_the_loss_of_all(session: TunedSession, batch: dict[str, Any]) -> None:
    logits = session.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(supervised_loss(session.model, batch), expected)


def test_no_position_reaches_the_head_but_a_samples_last_and_supervised_ones(
    session: TunedSession, batch: dict[str, Any]
) -> None:
    seen = watch_head(session)
    supervised_loss(session.model, batch)
    assert seen == [5, int((batch["labels"][:, 1:] != -100).sum())]


def test_the_head_is_one_product_for_all_samples(session: TunedSession, batch: dict[str, Any]) -> None:
    with torch.profiler.profile(record_shapes=True) as profile:
        supervised_loss(session.model, batch)
    vocabulary = session.backbone.lm_head.out_features
    by_sample = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert by_sample and not [shapes for shapes in by_sample if vocabulary in shapes[1]]


def test_a_loss_in_chunks_is_the_same(session: TunedSession, batch: dict[str, Any]) -> None:
    expected = supervised_loss(session.model, batch)
    torch.testing.assert_close(supervised_loss(session.model, batch, chunk=4), expected)


def test_a_loss_in_chunks_has_the_same_gradients(session: TunedSession, batch: dict[str, Any]) -> None:
    whole, in_chunks = gradients(session, batch), gradients(session, batch, chunk=4)
    assert whole and whole.keys() == in_chunks.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(in_chunks[name], gradient)


def test_a_loss_in_chunks_never_has_all_logits(session: TunedSession, batch: dict[str, Any]) -> None:
    """They are computed again, chunk by chunk, in the backward pass."""
    seen = watch_head(session)
    loss = supervised_loss(session.model, batch, chunk=4)
    forward = list(seen)
    loss.backward()
    first, *chunks = forward
    assert first == 5 and len(chunks) > 1 and max(chunks) == 4
    assert seen[len(forward) :] == chunks[::-1]


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_what_a_family_adds_to_its_head_is_kept(family: str) -> None:
    """Gemma caps its logits softly, after lm_head."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "final_logit_softcapping": 0.1,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    ids = torch.randint(5, 200, (2, 9))
    labels = torch.where(torch.arange(9) < 5, -100, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    if family == "gemma4":
        inputs["mm_token_type_ids"] = inputs.pop("token_type_ids")
    logits = model(**inputs).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(supervised_loss(model, {**inputs, "labels": labels}, chunk=3), expected)


def test_a_batch_without_supervision_is_refused(session: TunedSession, batch: dict[str, Any]) -> None:
    batch["labels"].fill_(-100)
    with pytest.raises(UserError, match="no supervised token"):
        supervised_loss(session.model, batch)
