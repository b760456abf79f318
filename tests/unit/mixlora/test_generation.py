"""Selection is made once, at prefill, and frozen for the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.data import load_conversations
from qmixlora.evaluation import generate_answers
from qmixlora.mixlora import MixLoraLayer
from qmixlora.mixlora import batch as tuner_module
from qmixlora.mixlora import layer as layer_module
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from tests.adapters import randomize


@pytest.fixture(
    params=[
        ("instruction", "conditional"),
        ("all", "conditional"),
        ("embedding", "conditional"),
        ("embedding", "tied"),
    ],
    ids="-".join,
)
def session(request: pytest.FixtureRequest, make_recipe: Callable[..., Recipe]) -> Session:
    route_on, pairing = request.param
    recipe = make_recipe(adapter={"route_on": route_on, "pairing": pairing, "gate": "straight_through"})
    session = open_session(recipe, [])
    randomize(session.model, "mixlora_", std=0.2, seed=0)
    session.model.eval()
    return session


@pytest.fixture
def rows(data: Path) -> list[dict[str, Any]]:
    conversations = load_conversations(str(data / "test.json"))
    return [conversations[i] for i in range(6)]  # prompts of different lengths


def first_layer(session: Session) -> MixLoraLayer:
    return next(m for m in session.model.modules() if isinstance(m, MixLoraLayer))


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}]
)
def test_the_selection_of_the_prefill_is_used_for_every_step(
    session: Session, rows: list[dict[str, Any]], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    selections, used = [], []
    layer, select, mixing = first_layer(session), layer_module.select, MixLoraLayer.mixing

    def count_select(*args: Any) -> torch.Tensor:
        selections.append(1)
        return select(*args)

    def record_mixing(self: MixLoraLayer, x: torch.Tensor, name: str) -> torch.Tensor:
        mix = mixing(self, x, name)
        if self is layer:
            used.append(mix)
        return mix

    monkeypatch.setattr(layer_module, "select", count_select)
    monkeypatch.setattr(tuner_module, "select", count_select)
    monkeypatch.setattr(MixLoraLayer, "mixing", record_mixing)
    session.model.generate(**session.collator.prompts(rows), max_new_tokens=5, min_new_tokens=5, **how)
    layers = sum(isinstance(m, MixLoraLayer) for m in session.model.modules())
    config = layer.mixlora_config["default"]
    ahead = config.selects_ahead  # all layers in one product
    assert len(selections) == (1 if ahead else layers)  # one prefill
    assert len(used) == 5
    assert all(torch.equal(mix, used[0]) for mix in used)
    if "num_beams" in how:  # every beam of a sample is routed alike, so reordering beams changes nothing
        beams = used[0].view(len(rows), 3, *used[0].shape[1:])
        torch.testing.assert_close(beams, beams[:, :1].expand_as(beams))


def test_left_padded_batches_answer_as_single_samples(session: Session, rows: list[dict[str, Any]]) -> None:
    if first_layer(session).mixlora_config["default"].route_on == "all":
        pytest.skip("routing on all positions counts padding, as the released code does")
    together = generate_answers(session, rows, 5)
    alone = [generate_answers(session, [row], 5)[0] for row in rows]
    assert len({len(session.collator.prompts([row])["input_ids"][0]) for row in rows}) > 1
    assert together == alone


def test_decoding_with_a_cache_equals_frozen_routing_without(session: Session, rows: list[dict[str, Any]]) -> None:
    """Teacher forcing the generated tokens with labels on them gives the logits that cached decoding gave."""
    if first_layer(session).mixlora_config["default"].route_on == "all":
        pytest.skip("`all` counts the answer too when it is there")
    inputs = session.collator.prompts(rows[:1])
    out = session.model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    labels = out.sequences.clone()
    labels[:, :length] = -100
    whole = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    with torch.no_grad():
        logits = session.model(**whole, labels=labels).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), logits[:, length - 1 : -1], rtol=1e-4, atol=1e-4)


def test_decoding_without_a_prefill_is_refused(session: Session, rows: list[dict[str, Any]]) -> None:
    inputs = session.collator.prompts(rows[:1])
    with session.model.disable_adapter(), torch.no_grad():
        cache = session.model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without a prefill"), torch.no_grad():
        session.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
