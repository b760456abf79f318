"""The MLP some tokens at a time: the same step, whatever segment a token is of; found by anatomy, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qmixlora.backbone.levers import chunk_mlps, enable_checkpointing
from qmixlora.backbone.levers.chunked_mlp import mlp_paths
from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.loss import supervised_logits, supervised_loss
from qmixlora.mixlora import routed_as
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from tests.families.case import Case
from tests.families.variant import variants

CHUNK = 23  # no divisor of anything


@pytest.fixture
def rows(data: Path, write_json: Callable[..., Path]) -> Any:
    """Conversations of three questions and of one."""
    image = str(next((data / "images").glob("train*.png")))

    def turns(count: int) -> list[dict[str, str]]:
        asked = [("what digit is it ?", "two"), ("what color is it ?", "red"), ("how many are there ?", "one")]
        return [
            {"from": who, "value": t} for pair in asked[:count] for who, t in zip(("human", "gpt"), pair, strict=True)
        ]

    made = [{"image": image, "task": "digit", "conversations": turns(count)} for count in (3, 1)]
    return list(load_conversations(str(write_json("turns.json", made)), allow_outside=True))


def step(session: TunedSession, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
    session.model.zero_grad()
    loss = supervised_loss(session.model.train(), session.collator(rows))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in session.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pairing", ["tied", "conditional"])
def test_a_step_in_chunks_is_the_step_of_the_whole(make_recipe: Callable[..., Recipe], rows: Any, pairing: str) -> None:
    session = open_session(make_recipe(adapter={"pairing": pairing, "condition_norm": "none"}), [])
    for name, parameter in session.model.named_parameters():
        if "mixlora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    enable_checkpointing(session.backbone, session.anatomy, session.recipe.train.checkpointing)
    batch = session.collator(rows)
    assert batch["segments"].amax(dim=1).tolist() == [2, 0]
    seen: list[int] = []
    mlp = session.backbone.get_submodule(mlp_paths(session.backbone, session.anatomy)[0])
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    (loss, gradients), whole = step(session, rows), seen.copy()
    with torch.no_grad():
        logits = supervised_logits(session.model.eval(), batch)
    seen.clear()
    chunk_mlps(session.backbone, session.anatomy, CHUNK)
    chunked_loss, chunked = step(session, rows)
    assert max(seen) <= CHUNK < min(whole)
    torch.testing.assert_close(chunked_loss, loss)
    assert chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(supervised_logits(session.model.eval(), batch), logits)


def test_chunks_go_on_from_a_cache_within_an_answer(make_recipe: Callable[..., Recipe], rows: Any) -> None:
    session = open_session(make_recipe(), [])
    batch = session.collator(rows[:1])
    told = {name: batch[name] for name in ("segments", "routing_mask")}
    end = batch["input_ids"].shape[1]
    cut = end - 2  # the last answer and the token that ends it
    assert not batch["routing_mask"][0, cut:].any()

    def rest() -> Tensor:
        with torch.no_grad(), routed_as(session.model.eval(), **told):
            first = session.model(input_ids=batch["input_ids"][:, :cut], pixel_values=batch["pixel_values"])
            logits: Tensor = session.model(
                input_ids=batch["input_ids"][:, cut:end], past_key_values=first.past_key_values
            ).logits
        return logits

    whole = rest()
    chunk_mlps(session.backbone, session.anatomy, 1)
    torch.testing.assert_close(rest(), whole)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "qwen3_5", "idefics3"])
def test_the_mlp_of_every_layer_is_found(name: str, tmp_path: Path) -> None:
    session = Case(variants()[name], tmp_path).session
    paths = mlp_paths(session.backbone, session.anatomy)
    assert paths == [f"{layer}.mlp" for layer in session.anatomy.layers]


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    session = open_session(Case(variants()["qwen3_vl_moe"], tmp_path).recipe(model={"quantization": "none"}), [])
    with pytest.raises(UserError, match=r"No MLP that could be computed some tokens at a time[\s\S]*train.mlp_chunk"):
        chunk_mlps(session.backbone, session.anatomy, CHUNK)
