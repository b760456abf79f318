"""The planner: the simulated step against torch's own allocator, the figures it is to reach, advice and recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig, LlavaForConditionalGeneration

from qmixlora.demo.backbone import make_config
from qmixlora.device import GIB
from qmixlora.errors import CheckError, UserError
from qmixlora.memory import card_bytes, card_of, check_fit, plan, plan_with_advice, planner
from qmixlora.memory.residuals import remembered
from qmixlora.memory.simulation import step
from qmixlora.memory.simulation.batch import batches_of, synthetic_batch
from qmixlora.memory.simulation.skeleton import meta_backbone, tensors_of
from qmixlora.recipe import Recipe, edited, load_recipe, shipped_recipes
from qmixlora.session import open_session
from qmixlora.training.probe import probe, reserved

SHIPPED = 25  # recipes that are named after a card
LLAVA_7B, LLAVA_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
QWEN_7B = "Qwen/Qwen2.5-VL-7B-Instruct"


def recipe_of(model: str, adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
    values = {"model": {"id": model}, "adapter": adapter or {}, "data": {"train": "-"}, "train": train}
    return Recipe.model_validate(values)


def in_fp32(recipe: Recipe, *overrides: str) -> Recipe:
    """bitsandbytes' bf16 kernels are slow on a CPU."""
    return edited(recipe, ["model.dtype=float32", *overrides])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A LLaVA whose activations are megabytes: blocks of 512 bytes do not show."""
    folder = tmp_path_factory.mktemp("wide")
    LlavaForConditionalGeneration(make_config(processor.tokenizer, layers=4, width=256)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("adapter", "train", "model"),
    [
        ({}, {}, []),
        ({}, {"checkpointing": {"enabled": False}}, []),
        ({}, {"gradient_accumulation": 1, "loss_chunk": None}, []),
        ({"method": "lora", "r": 16}, {"optimizer": "paged_adamw_8bit"}, []),
        ({"pairing": "conditional", "gate": "straight_through", "route_on": "instruction"}, {}, []),
        ({"route_on": "task"}, {"checkpointing": {"every_n_layers": 2}}, []),
        ({}, {}, ["model.offload_embeddings=true", "model.stream_layers=3"]),
        ({"train_projector": False}, {"cache_features": True}, []),
    ],
)
def test_a_probe_measures_what_was_planned(
    wide: Path, adapter: dict[str, Any], train: dict[str, Any], model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the real Trainer with random NF4 weights: within 1 % of what torch's CPU allocator hands out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(wide / "cache"))
    recipe = in_fp32(recipe_of(str(wide), {"dropout": 0.0, **adapter}, **{"micro_batch_size": 3, **train}), *model)
    found = plan(recipe, tokens=150)
    result = probe(recipe, found)
    assert result.measured > 20 * 2**20
    assert result.planned == pytest.approx(result.measured, rel=0.01)
    assert remembered()["cpu"][str(wide)] == result.residual == result.measured - result.planned


def test_a_bfloat16_step_is_planned_too(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(wide / "cache"))
    train = {"micro_batch_size": 2, "gradient_accumulation": 1, "optimizer": "paged_adamw_8bit"}
    recipe = recipe_of(str(wide), {"dropout": 0.0}, **train)
    result = probe(recipe, plan(recipe, tokens=80))
    assert result.planned == pytest.approx(result.measured, rel=0.01)


def test_what_a_probe_found_missing_is_planned_with() -> None:
    recipe = recipe_of(LLAVA_7B)
    found, more = plan(recipe, tokens=700), plan(recipe, tokens=700, residual=GIB)
    assert more.peak - found.peak == GIB and more.tensors == found.tensors
    paged = edited(recipe, ["train.optimizer=paged_adamw_8bit"])
    assert reserved(more, recipe) == reserved(found, recipe) == found.peak - planner.CONTEXT
    assert reserved(found, paged) == found.peak - planner.CONTEXT - found.parts["optimizer"]
    card = int((found.peak + GIB // 2) / (1 - planner.MARGIN))
    assert plan(recipe, card=card, tokens=700).fits and not plan(recipe, card=card, tokens=700, residual=GIB).fits


def test_pictures_of_any_size_are_planned_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small Qwen2.5-VL, whose positions and windows are worked out from the picture's size while it runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = small_qwen(4)
    config.save_pretrained(tmp_path)
    recipe = in_fp32(recipe_of(str(tmp_path), {"dropout": 0.0}, micro_batch_size=2))
    one, two = plan(recipe, tokens=200), plan(recipe, tokens=400)
    # on a CPU a batch is copied nowhere: pictures are small here, so that their pixels make no difference
    few = edited(recipe, ["data.max_image_tokens=16"])
    result = probe(few, plan(few, tokens=200))
    assert result.planned == pytest.approx(result.measured, rel=0.01)
    assert one.parts["activations saved"] < 0.6 * two.parts["activations saved"]
    grid = one.batch.inputs["image_grid_thw"]
    assert one.batch.image_tokens == int(grid[0, 1] * grid[0, 2]) // 4


def small_qwen(layers: int) -> Any:
    return CONFIG_MAPPING["qwen2_5_vl"](
        text_config={
            "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": layers, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 500,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        image_token_id=499, video_token_id=498, vision_start_token_id=497, vision_end_token_id=496,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        ({}, []),
        ({"pairing": "conditional", "gate": "straight_through", "route_on": "all"}, ["train.gradient_accumulation=1"]),
        ({"method": "lora", "r": 8}, ["train.checkpointing.every_n_layers=3"]),
        ({}, ["train.checkpointing.enabled=false"]),
        ({}, ["model.stream_layers=7", "model.offload_embeddings=true"]),
        ({}, ["train.checkpointing.offload=true"]),
    ],
)
def test_shallow_models_give_what_the_deep_one_gives(
    tmp_path: Path, adapter: dict[str, Any], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_qwen(10).save_pretrained(tmp_path)
    recipe = edited(recipe_of(str(tmp_path), adapter), overrides)
    found = plan(recipe, tokens=300)
    monkeypatch.setattr(step, "shallow_depths", lambda config, period: [10])
    whole = plan(recipe, tokens=300)
    assert found.host == whole.host and found.loading == pytest.approx(whole.loading, abs=2**14)
    assert found.place == whole.place
    for name in set(whole.parts) - {planner.GAPS}:
        assert found.parts[name] == pytest.approx(whole.parts[name], abs=2**16), name


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
    mine = parts["adapter"] + parts["routers"] + parts["projector"]
    assert mine == pytest.approx(trained, rel=0.01)  # and the buffers of the centre
    assert parts["kept-out weights"] == pytest.approx(rest, rel=0.01)


PAPER = {"pairing": "conditional", "gate": "straight_through", "route_on": "all"}


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
    """Tensors of batch 1, one picture, 1,024 tokens, E=16, R=4, all linear layers, projector trained (GiB)."""
    found = plan(edited(recipe_of(model, adapter), overrides), tokens=1024)
    assert 0.5 * most < found.tensors / GIB < most
    if most in (8 * 0.92, 12 * 0.92, 24 * 0.92):  # the whole of it on the card
        assert found.peak / GIB < most


def test_what_checkpointing_and_the_optimizer_save() -> None:
    base = plan(recipe_of(LLAVA_7B), tokens=1024)
    dense = plan(recipe_of(LLAVA_7B, checkpointing={"enabled": False}), tokens=1024)
    assert dense.peak - base.peak > 7 * GIB
    eight = plan(recipe_of(LLAVA_7B, optimizer="paged_adamw_8bit"), tokens=1024)
    assert eight.parts["optimizer"] < 0.27 * base.parts["optimizer"]
    longer = plan(recipe_of(LLAVA_7B), tokens=2048)
    assert longer.parts["activations saved"] == pytest.approx(2 * base.parts["activations saved"], rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "part", "on_host"),
    [
        (["train.loss_chunk=16"], "gradients and transients", None),
        (["train.checkpointing.offload=true"], "activations saved", "activations"),
        (["model.offload_embeddings=true"], "kept-out weights", "embeddings"),
        (["model.stream_layers=20"], "NF4 weights", "streamed layers"),
        (["model.quantize_lm_head=nf4"], "kept-out weights", None),
        (["model.quantize_lm_head=int8"], "kept-out weights", None),
        (["model.quantize_embeddings=nf4"], "kept-out weights", None),
        (["data.max_image_tokens=100"], "activations saved", None),
        (["adapter.train_projector=false", "train.cache_features=true"], "kept-out weights", None),
        (["train.optimizer=adamw_8bit"], "optimizer", None),
    ],
)
def test_every_lever_shows_in_the_plan(overrides: list[str], part: str, on_host: str | None) -> None:
    recipe = edited(recipe_of(QWEN_7B), ["train.loss_chunk=256"])
    config = planner.config_of(recipe.model)
    batch = synthetic_batch(config, recipe, 1024)
    before = plan(recipe, batch=batch)
    changed = edited(recipe, overrides)
    if changed.data.max_image_tokens:
        batch = synthetic_batch(config, changed, 1024 - batch.image_tokens + changed.data.max_image_tokens)
    after = plan(changed, batch=batch)
    assert after.parts[part] < 0.99 * before.parts[part] and after.peak < before.peak
    assert not before.host and set(after.host) == ({on_host} if on_host else set())


def test_a_tied_model_is_told_so_and_gets_no_advice_that_fails() -> None:
    recipe = recipe_of("Qwen/Qwen2.5-VL-3B-Instruct", optimizer="paged_adamw_8bit")
    with pytest.raises(UserError, match="one tensor"):
        plan(edited(recipe, ["model.quantize_lm_head=nf4"]), tokens=600)
    edits = [entry["edit"] for entry in plan_with_advice(recipe, tokens=600)["advice"]]
    assert edits and not any("lm_head" in edit or "embeddings" in edit for edit in edits)


def test_the_worst_of_the_data_at_hand_is_planned(
    make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    for index in range(20):
        Image.new("RGB", (28, 28), (index, 0, 0)).save(tmp_path / f"{index}.png")
    question = {"from": "human", "value": "<image>\nwhat color is it ?"}
    rows = [
        {"image": f"{i}.png", "conversations": [question, {"from": "gpt", "value": " ".join(["red"] * (1 + i))}]}
        for i in range(20)
    ]
    recipe = make_recipe(data={"train": str(write_json("data.json", rows))}, train={"micro_batch_size": 2})
    [batch] = batches_of(recipe, planner.config_of(recipe.model), None)
    labels = batch.inputs["labels"]
    assert [int(n) for n in (labels != -100).sum(dim=1)] == [21, 20]  # the two longest, each with its end
    assert (
        batch.tokens == labels.shape[1] and f"largest {batch.tokens}" in batch.source and "20 samples" in batch.source
    )
    assert plan(recipe, batch=batch).peak > 0
    told = plan_with_advice(recipe)["batch"]
    assert told["samples"] == 2 and told["tokens"] == batch.tokens and "median" in told["source"]
    [other] = batches_of(recipe, planner.config_of(recipe.model), 64)  # the user says how long
    assert other.tokens == 64


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
    edits = {entry["edit"]: entry["saves_gib"] for entry in found["advice"]}
    assert "train.micro_batch_size=2 train.gradient_accumulation=8" in edits
    assert list(edits.values()) == sorted(edits.values(), reverse=True)
    better = plan(edited(recipe, ["train.optimizer=paged_adamw_8bit"]), tokens=700)
    assert found["peak_gib"] - better.peak / GIB == pytest.approx(edits["train.optimizer=paged_adamw_8bit"])
    json.dumps(found)


def test_the_largest_that_fits_fits_and_one_more_does_not() -> None:
    recipe, card = recipe_of(LLAVA_7B), 9 * GIB
    largest = plan_with_advice(recipe, card=card, tokens=700)["largest"]
    for samples, fits in ((largest["micro_batch_size"], True), (largest["micro_batch_size"] + 1, False)):
        assert plan(edited(recipe, [f"train.micro_batch_size={samples}"]), card=card, tokens=700).fits is fits
    for tokens, fits in ((largest["tokens"], True), (largest["tokens"] + 128, False)):
        assert plan(recipe, card=card, tokens=tokens).fits is fits
    small = plan_with_advice(recipe, card=6 * GIB, tokens=700)
    assert not small["fits"] and small["largest"]["micro_batch_size"] == 0
    assert any(entry["fits"] for entry in small["advice"])


def test_every_recipe_for_a_card_fits_it_and_says_so() -> None:
    checked: dict[str, list[str]] = {}
    families = set()
    for name, text in shipped_recipes().items():
        if (card := card_of(name)) is not None:
            recipe = load_recipe(name)
            assert check_fit(name, text, recipe).fits
            checked.setdefault(card.rpartition("-")[2], []).append(name)
            families.add(planner.config_of(recipe.model).model_type)
    assert sum(map(len, checked.values())) == SHIPPED
    assert len(families) >= 7
    assert all(len(checked[size]) >= 2 for size in ("8gb", "12gb", "16gb", "24gb", "32gb"))


def test_a_recipe_that_does_not_fit_or_says_something_else(tmp_path: Path) -> None:
    name = "llava-1.5-7b-rtx4060-8gb"
    text, recipe = shipped_recipes()[name], load_recipe(name)
    with pytest.raises(CheckError, match="leaves less than 8% of the 8 GiB free"):
        check_fit(name, text, edited(recipe, ["train.micro_batch_size=8"]))
    with pytest.raises(CheckError, match=r"predicts 5.0 GiB, the plan \d.\d GiB"):
        check_fit(name, re.sub(r"[\d.]+ GiB", "5.0 GiB", text, count=1), recipe)
    with pytest.raises(CheckError, match="predicts nothing"):
        check_fit(name, "", recipe)


def test_mistakes(backbone: Path, make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="Did you mean rtx3060-12gb"):
        card_bytes("rtx3060")
    with pytest.raises(UserError, match="do not hold a picture of 576"):
        plan(recipe_of(LLAVA_7B), tokens=500)
    with pytest.raises(UserError, match="pictures of 'blip' models"):
        synthetic_batch(CONFIG_MAPPING["blip"](), recipe_of("x"), 1000)
    with pytest.raises(UserError, match="configuration cannot be read"):
        plan(recipe_of("/nowhere/model"))
