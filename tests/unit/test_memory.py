"""The planner: the simulated step against torch's own allocator, and the figures it is to reach."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

from qmixlora.backbone import find_anatomy
from qmixlora.demo.backbone import make_config
from qmixlora.errors import CheckError, UserError
from qmixlora.loss import supervised_loss
from qmixlora.memory import GIB, Plan, card_bytes, card_of, check_fit, plan, plan_with_advice, planner
from qmixlora.memory.advice import edited
from qmixlora.memory.attention import fused_attention
from qmixlora.memory.batch import synthetic_batch
from qmixlora.memory.simulation import LiveStorages
from qmixlora.memory.skeleton import meta_backbone, meta_linear4bit, tensors_of
from qmixlora.recipe import Recipe, load_recipe, shipped_recipes
from qmixlora.session import Session, adapter_config, assemble, open_session
from qmixlora.training import enable_checkpointing

LLAVA_7B, LLAVA_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"


def recipe_of(model: str, adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
    values = {"model": {"id": model}, "adapter": adapter or {}, "data": {"train": "-"}, "train": train}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A LLaVA whose activations are megabytes: blocks of 512 bytes do not show."""
    folder = tmp_path_factory.mktemp("wide")
    LlavaForConditionalGeneration(make_config(processor.tokenizer, layers=4, width=256)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        ({}, {}),
        ({}, {"checkpointing": {"enabled": False}}),
        ({}, {"gradient_accumulation": 1, "loss_chunk": None}),
        ({"method": "lora", "r": 16}, {}),
        ({"pairing": "conditional", "gate": "straight_through", "route_on": "instruction"}, {"micro_batch_size": 2}),
        ({"route_on": "task"}, {"checkpointing": {"every_n_layers": 2}}),
    ],
)
def test_the_simulated_step_takes_what_the_real_one_takes(
    wide: Path, adapter: dict[str, Any], train: dict[str, Any]
) -> None:
    """Within 1 % of what torch's CPU allocator hands out over the same step with real NF4 weights."""
    recipe = in_fp32(recipe_of(str(wide), {"dropout": 0.0, **adapter}, **{"micro_batch_size": 4, **train}))
    inputs = synthetic_batch(AutoConfig.from_pretrained(wide), recipe, 200).inputs
    peak = allocated(open_session(recipe, ["plan", "other"]), inputs)
    assert peak > 10 * 2**20
    assert step_of(plan(recipe, tokens=200)) == pytest.approx(peak, rel=0.01)


def in_fp32(recipe: Recipe, **model: Any) -> Recipe:
    """bitsandbytes' bf16 kernels are slow on a CPU."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32", **model})})


def step_of(found: Plan) -> int:
    return found.parts["activations saved"] + found.parts["gradients and transients"]


def allocated(session: Session, inputs: dict[str, Any]) -> int:
    """The most that one real step takes of torch's CPU allocator, beyond the model; the batch is part of it."""
    enable_checkpointing(session)
    session.model.train()
    loss = partial(supervised_loss, session.model, chunk=session.recipe.train.loss_chunk)
    if session.recipe.train.gradient_accumulation > 1:
        loss(inputs).backward()  # gradients of an earlier micro-batch wait
    gc.collect()  # models of earlier tests, freed meanwhile, would be taken off the account
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        loss(batch).backward()
    gc.enable()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_pictures_of_any_size_are_planned_as_they_are(tmp_path: Path) -> None:
    """A small Qwen2.5-VL, whose positions and windows are worked out from the picture's size while it runs."""
    config = CONFIG_MAPPING["qwen2_5_vl"](
        text_config={
            "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 500,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        image_token_id=499, video_token_id=498, vision_start_token_id=497, vision_end_token_id=496,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    recipe = recipe_of(str(tmp_path), {"dropout": 0.0}, micro_batch_size=4, checkpointing={"enabled": False})
    recipe = in_fp32(recipe, quantization="none")
    one, two = (plan(recipe, tokens=tokens).parts["activations saved"] for tokens in (400, 800))
    assert 20 * 2**20 < one < 0.6 * two
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    anatomy = find_anatomy(model)
    session = assemble(recipe, model, None, anatomy, adapter_config(recipe.adapter, anatomy, []))
    peak = allocated(session, synthetic_batch(config, recipe, 400).inputs)
    assert step_of(plan(recipe, tokens=400)) == pytest.approx(peak, rel=0.02)
    batch = synthetic_batch(config, recipe, 400).inputs
    edge = int(batch["image_grid_thw"][0, 1])
    assert (batch["input_ids"] == 499).sum() == 4 * (edge // 2) ** 2 and len(batch["pixel_values"]) == 4 * edge**2


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
    assert parts["NF4 weights"] == four_bit
    assert parts["adapter"] == pytest.approx(trained, rel=0.01)  # and the buffers of the centre
    assert parts["kept-out weights"] == pytest.approx(rest, rel=0.01)


@pytest.mark.parametrize(
    ("model", "adapter", "optimizer", "most"),
    [
        (LLAVA_7B, {}, "adamw", 6.0),
        (LLAVA_7B, {"pairing": "conditional", "gate": "straight_through", "route_on": "all"}, "paged_adamw_8bit", 6.6),
        (LLAVA_13B, {}, "paged_adamw_8bit", 12 * 0.92),
        ("Qwen/Qwen2.5-VL-3B-Instruct", {}, "adamw", 8 * 0.92),
        ("Qwen/Qwen2.5-VL-32B-Instruct", {}, "paged_adamw_8bit", 24 * 0.92),
    ],
)
def test_figures_to_reach(model: str, adapter: dict[str, Any], optimizer: str, most: float) -> None:
    """Tensors of batch 1, one picture, 1,024 tokens, E=16, R=4, all linear layers, projector trained (GiB)."""
    found = plan(recipe_of(model, adapter, optimizer=optimizer), tokens=1024)
    beside = ("CUDA context and workspaces (assumed)", "allocator's gaps")
    tensors = (found.peak - sum(found.parts[name] for name in beside)) / GIB
    assert 0.5 * most < tensors < most


def test_what_checkpointing_and_the_optimizer_save() -> None:
    base = plan(recipe_of(LLAVA_7B), tokens=1024)
    dense = plan(recipe_of(LLAVA_7B, checkpointing={"enabled": False}), tokens=1024)
    assert dense.peak - base.peak > 7 * GIB
    eight = plan(recipe_of(LLAVA_7B, optimizer="paged_adamw_8bit"), tokens=1024)
    assert eight.parts["optimizer"] < 0.27 * base.parts["optimizer"]
    longer = plan(recipe_of(LLAVA_7B), tokens=2048)
    assert longer.parts["activations saved"] == pytest.approx(2 * base.parts["activations saved"], rel=0.15)


def test_attention_never_holds_the_square(wide: Path) -> None:
    query = torch.empty(2, 4, 512, 32, device="meta", requires_grad=True)
    with LiveStorages([query]) as storages:
        out, _ = fused_attention(nn.Identity(), query, query, query, None)
        out.sum().backward()
    assert out.shape == (2, 512, 4, 32) and query.grad is not None and query.grad.shape == query.shape
    assert storages.account.peak < 2 * 4 * 512 * 512 * 4


def test_index_tensors_keep_their_values() -> None:
    states = torch.empty(3, 7, device="meta")
    with LiveStorages([states]) as storages:
        mask = (torch.arange(3) != 1).to("meta")
        assert states[mask].shape == (2, 7) and mask.nonzero().shape == (2, 1) and int(mask.sum()) == 2
        with pytest.raises(RuntimeError, match="cannot be planned"):
            float(states.sum())
        del mask
    assert storages.account.live < 3 * 512


def test_a_layer_without_storage_has_the_bytes_of_a_real_one() -> None:
    real = bnb.nn.Linear4bit(256, 320, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    real.weight = bnb.nn.Params4bit(torch.randn(320, 256), requires_grad=False, quant_type="nf4").to("cpu")
    made = meta_linear4bit(nn.Linear(256, 320, bias=False, device="meta"))
    one, two = real.weight.quant_state, made.weight.quant_state
    assert made.weight.shape == real.weight.shape and two.absmax.shape == one.absmax.shape
    assert two.state2.absmax.shape == one.state2.absmax.shape and two.shape == one.shape
    assert made(torch.empty(2, 256, dtype=torch.bfloat16, device="meta")).shape == (2, 320)


def test_tied_weights_count_once(wide: Path) -> None:
    config = AutoConfig.from_pretrained(wide)
    spec = recipe_of(str(wide)).model
    apart = plan(recipe_of(str(wide)), tokens=100).parts["kept-out weights"]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model, _ = meta_backbone(config, spec)
    model.tie_weights()
    keys = {tensor.untyped_storage()._cdata: tensor.nbytes for _, tensor in tensors_of(model)}
    assert sum(keys.values()) < apart + sum(
        t.nbytes for n, t in tensors_of(model) if "scales" in n or t.dtype == torch.uint8
    )


def test_advice_is_planned_and_can_be_pasted() -> None:
    recipe = recipe_of(LLAVA_7B, micro_batch_size=4, gradient_accumulation=4)
    found = plan_with_advice(recipe, card=card_bytes("rtx3060-12gb"), tokens=700)
    assert found["fits"] and found["card_gib"] == 12 and found["margin_gib"] > found["needed_margin_gib"]
    edits = {edit["edit"]: edit["saves_gib"] for edit in found["advice"]}
    assert "train.micro_batch_size=2 train.gradient_accumulation=8" in edits
    assert list(edits.values()) == sorted(edits.values(), reverse=True)
    better = plan(edited(recipe, ["train.optimizer=paged_adamw_8bit"]), tokens=700)
    assert found["peak_gib"] - better.peak / GIB == pytest.approx(edits["train.optimizer=paged_adamw_8bit"])
    assert not plan_with_advice(recipe, card=6 * GIB, tokens=700)["fits"]
    json.dumps(found)


def test_every_recipe_for_a_card_fits_it_and_says_so() -> None:
    checked = []
    for name, text in shipped_recipes().items():
        if card_of(name) is not None:
            found = check_fit(name, text, load_recipe(name))
            assert found.fits
            checked.append(name)
    assert len(checked) == 5


def test_a_recipe_that_does_not_fit_or_says_something_else(tmp_path: Path) -> None:
    name = "llava-1.5-7b-rtx4060-8gb"
    text, recipe = shipped_recipes()[name], load_recipe(name)
    with pytest.raises(CheckError, match="leaves less than 8% of the 8 GiB free"):
        check_fit(name, text, edited(recipe, ["train.micro_batch_size=8"]))
    with pytest.raises(CheckError, match=r"predicts 5.0 GiB, the plan 6.3 GiB"):
        check_fit(name, text.replace("6.3 GiB", "5.0 GiB"), recipe)
    with pytest.raises(CheckError, match="predicts nothing"):
        check_fit(name, "", recipe)


def test_mistakes(backbone: Path, make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="Did you mean rtx3060-12gb"):
        card_bytes("rtx3060")
    with pytest.raises(UserError, match="do not hold a picture of 576"):
        plan(recipe_of(LLAVA_7B), tokens=500)
    with pytest.raises(UserError, match="'gemma3' models cannot be planned yet"):
        synthetic_batch(CONFIG_MAPPING["gemma3"](), recipe_of("x"), 1000)
    with pytest.raises(UserError, match="configuration cannot be read"):
        plan(recipe_of("/nowhere/model"))
