"""The plan: the figures that it is to reach, what levers save in it, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import Plan, plan, planner
from qmixlora.memory.simulation.batch import synthetic_batch
from qmixlora.recipe import edited
from qmixlora.session import open_session

from .helpers import LLAVA_7B, LLAVA_13B, QWEN_7B, in_fp32, recipe_of, small_qwen

PAPER = {"r": 4, "alpha": 8, "pairing": "conditional", "gate": "straight_through", "route_on": "all"}


@pytest.mark.parametrize(
    ("model", "adapter", "overrides", "most"),
    [
        (LLAVA_7B, {}, [], 6.0),
        (LLAVA_7B, PAPER, ["train.optimizer=paged_adamw_8bit"], 6.6),
        (QWEN_7B, {}, ["train.optimizer=paged_adamw_8bit", "model.offload_embeddings=true"], 7.5),
        (LLAVA_13B, {}, ["train.optimizer=paged_adamw_8bit"], 12 * 0.92),
        (LLAVA_7B, {}, ["train.optimizer=paged_adamw_8bit"], 8 * 0.92),
        (
            "Qwen/Qwen2.5-VL-32B-Instruct",
            {},
            ["train.optimizer=paged_adamw_8bit", "model.offload_embeddings=true"],
            24 * 0.92,
        ),
    ],
)
def test_figures_to_reach(model: str, adapter: dict[str, Any], overrides: list[str], most: float) -> None:
    """Tensors of batch 1, one image, 1,024 tokens, E=16, R=4, all linear layers, projector trained (GiB)."""
    planned = plan(edited(recipe_of(model, adapter), overrides), tokens=1024)
    assert 0.5 * most < planned.tensors / GIB < most
    if most in (8 * 0.92, 12 * 0.92, 24 * 0.92):  # the whole of it on the card
        assert planned.peak / GIB < most


def test_checkpointing_saves_gigabytes() -> None:
    base = plan(recipe_of(LLAVA_7B), tokens=1024)
    dense = plan(recipe_of(LLAVA_7B, checkpointing={"enabled": False}), tokens=1024)
    assert dense.peak - base.peak > 5.5 * GIB


def test_8_bit_states_take_a_quarter() -> None:
    base, eight = (plan(recipe_of(LLAVA_7B, optimizer=name), tokens=1024) for name in ("adamw", "paged_adamw_8bit"))
    assert eight.parts.optimizer < 0.27 * base.parts.optimizer


def test_twice_as_long_samples_save_twice_the_activations() -> None:
    base, longer = (plan(recipe_of(LLAVA_7B), tokens=tokens) for tokens in (1024, 2048))
    assert longer.parts.activations_saved == pytest.approx(2 * base.parts.activations_saved, rel=0.15)


def test_more_images_of_any_size_are_more_to_save(tmp_path: Path) -> None:
    small_qwen(4).save_pretrained(tmp_path)
    recipe = in_fp32(recipe_of(str(tmp_path), {"dropout": 0.0}, micro_batch_size=2))
    one, two = plan(recipe, tokens=200), plan(recipe, tokens=400)
    assert one.parts.activations_saved < 0.6 * two.parts.activations_saved


def test_the_image_tokens_of_a_planned_batch_are_those_of_its_grid(tmp_path: Path) -> None:
    small_qwen(4).save_pretrained(tmp_path)
    batch = plan(in_fp32(recipe_of(str(tmp_path))), tokens=200).batch
    grid = batch.inputs["image_grid_thw"]
    assert batch.image_tokens == int(grid[0, 1] * grid[0, 2]) // 4


def test_what_probes_found_missing_is_added_to_the_peak() -> None:
    recipe = recipe_of(LLAVA_7B)
    without, with_more = plan(recipe, tokens=700), plan(recipe, tokens=700, residual=GIB)
    assert with_more.peak - without.peak == GIB and with_more.tensors == without.tensors


def test_what_probes_found_missing_decides_whether_a_card_holds_it() -> None:
    recipe = recipe_of(LLAVA_7B)
    card = int((plan(recipe, tokens=700).peak + GIB // 2) / (1 - planner.MARGIN))
    assert plan(recipe, card=card, tokens=700).fits
    assert not plan(recipe, card=card, tokens=700, residual=GIB).fits


def test_samples_that_hold_no_image_are_refused() -> None:
    with pytest.raises(UserError, match="do not hold an image of 576"):
        plan(recipe_of(LLAVA_7B), tokens=500)


def test_a_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="configuration cannot be read"):
        plan(recipe_of("/nowhere/model"))


WITHOUT_LEVERS = edited(recipe_of(QWEN_7B), ["train.loss_chunk=256"])


@pytest.fixture(scope="module")
def without_levers() -> Plan:
    return plan(WITHOUT_LEVERS, tokens=1024)


@pytest.mark.parametrize(
    ("overrides", "part", "on_host"),
    [
        (["train.loss_chunk=16"], "transients", None),
        (["train.checkpointing.offload=true"], "activations_saved", "activations"),
        (["model.offload_embeddings=true"], "kept_out_weights", "embeddings"),
        (["model.stream_layers=20"], "nf4_weights", "streamed_layers"),
        (["model.quantize_lm_head=nf4"], "kept_out_weights", None),
        (["model.quantize_lm_head=int8"], "kept_out_weights", None),
        (["model.quantize_embeddings=nf4"], "kept_out_weights", None),
        (["model.quantize_vision=int8"], "kept_out_weights", None),
        (["data.max_image_tokens=100"], "activations_saved", None),
        (["adapter.projector=frozen", "train.cache_features=true"], "kept_out_weights", None),
        (["adapter.projector=lora"], "projector", None),
        (["train.optimizer=adamw_8bit"], "optimizer", None),
    ],
)
def test_every_lever_shows_in_the_plan(
    without_levers: Plan, overrides: list[str], part: str, on_host: str | None
) -> None:
    before, batch, changed = without_levers, without_levers.batch, edited(WITHOUT_LEVERS, overrides)
    if changed.data.max_image_tokens:
        shorter = 1024 - batch.image_tokens + changed.data.max_image_tokens
        batch = synthetic_batch(planner.config_of(changed.model), changed, shorter)
    after = plan(changed, batch=batch)
    assert getattr(after.parts, part) < 0.99 * getattr(before.parts, part) and after.peak < before.peak
    assert not any(asdict(before.host).values())
    assert [name for name, size in asdict(after.host).items() if size] == ([on_host] if on_host else [])


def test_chunks_of_the_mlp_show_in_the_plan_where_there_are_many_tokens() -> None:
    whole = edited(WITHOUT_LEVERS, ["train.micro_batch_size=8"])
    chunked = edited(whole, ["train.mlp_chunk=256"])
    before, after = plan(whole, tokens=1024), plan(chunked, tokens=1024)
    assert after.parts.transients < 0.9 * before.parts.transients and after.peak < before.peak


def test_weights_without_storage_are_as_large_as_real_ones(wide: Path) -> None:
    recipe = recipe_of(str(wide))
    real = open_session(recipe, []).model
    parts = plan(recipe, tokens=100).parts
    four_bit = sum(
        m.weight.nbytes + m.weight.quant_state.absmax.nbytes + m.weight.quant_state.state2.absmax.nbytes
        + m.weight.quant_state.code.nbytes
        for m in real.modules()
        if isinstance(m, bnb.nn.Linear4bit)
    )  # fmt: skip
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    rest = sum(p.nbytes for n, p in real.named_parameters() if not p.requires_grad and p.dtype != torch.uint8)
    assert parts.nf4_weights == four_bit
    mine = parts.adapter + parts.routers + parts.projector
    assert mine == pytest.approx(trained, rel=0.01)  # and the buffers of the centre
    assert parts.kept_out_weights == pytest.approx(rest, rel=0.01)
