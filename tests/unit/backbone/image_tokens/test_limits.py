"""What images take, by family: against the real processors, and in a real step of tiny models.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig

from qmixlora.backbone import find_anatomy
from qmixlora.backbone.image_tokens import FAMILIES, largest_images, limit_image_tokens
from qmixlora.errors import UserError

from .families import IMAGE, MAKERS, image_tokens, internvl, llava, process

ROOT = Path(__file__).parents[4]
CASES = [  # family, budget, the most image tokens of an image, height and width of one that has as many
    ("llava", None, 16, (50, 70)),
    ("llava", 16, 16, (50, 70)),
    ("llava_onevision", None, 128, (112, 42)),  # 16 for the whole; 16 x 6, not over 1.1 x 5 tiles; 16 new lines
    ("llava_onevision", 60, 56, (56, 28)),
    ("llava_onevision", 36, 36, (50, 50)),
    ("qwen2_vl", 35, 35, (5 * 28, 7 * 28)),
    ("qwen2_5_vl", 35, 35, (5 * 28, 7 * 28)),
    ("qwen2_5_vl", 34, 33, (3 * 28, 11 * 28)),
    ("qwen3_vl", 35, 35, (5 * 32, 7 * 32)),
    ("gemma3", None, 4, (50, 70)),
    ("gemma3", 4, 4, (50, 70)),
    ("internvl", None, 13 * 4, (28, 12 * 28)),
    ("internvl", 20, 5 * 4, (4 * 28, 28)),
    ("internvl", 11, 4, (50, 70)),  # two tiles would come with a third
    ("idefics3", None, 17 * 4, (112, 112)),
    ("smolvlm", 20, 5 * 4, (80, 80)),
    ("smolvlm", 19, 4, (80, 80)),
]


@pytest.mark.parametrize(("family", "budget", "most", "shape"), CASES)
def test_the_largest_image_is_what_the_processor_gives(
    family: str, budget: int | None, most: int, shape: tuple[int, int]
) -> None:
    config, processor = MAKERS[family]()
    limit_image_tokens(processor, config, budget)
    real = process(processor, shape)
    assert image_tokens(real) == most
    length = real["input_ids"].shape[1]
    ids_BS, tensors = largest_images(config, 2, length + 7, budget)
    made = {"input_ids": ids_BS[:, :length], **tensors}
    if "mm_token_type_ids" in made or "token_type_ids" in made:
        name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
        assert made[name].shape == ids_BS.shape
        made[name] = made[name][:, :length]
        assert torch.equal(made[name], real[name])
    assert made.keys() == real.keys() - {"attention_mask"}
    for name, tensor in made.items():
        assert tensor.shape == real[name].shape and tensor.dtype == real[name].dtype, name
        if name not in {"input_ids", "pixel_values", "image_sizes"}:
            assert torch.equal(tensor, real[name]), name
    assert torch.equal(made["input_ids"] == IMAGE, real["input_ids"] == IMAGE)


@pytest.mark.parametrize(("family", "budget", "most", "shape"), CASES)
def test_a_model_takes_a_step_on_the_largest_image(
    family: str, budget: int | None, most: int, shape: tuple[int, int]
) -> None:
    """transformers compares the image tokens with the features; the gradient arrives in the projector."""
    config, _ = MAKERS[family]()
    limit_image_tokens(None, config, budget)
    ids_BS, tensors = largest_images(config, 2, most + 60, budget)
    if config.model_type not in {"idefics3", "smolvlm"}:  # there, what stands in the batch is enough
        tensors["pixel_values"].normal_()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    loss = model(input_ids=ids_BS, labels=ids_BS, **tensors).loss
    loss.backward()
    projector = model.get_submodule(find_anatomy(model).projectors[0])
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in projector.parameters())


@pytest.mark.parametrize(
    ("family", "budget"),
    [
        *((family, None) for family in ("llava_onevision", "internvl", "idefics3")),
        *(("llava_onevision", budget) for budget in (36, 60, 61, 90, 110)),
        *(("internvl", budget) for budget in (4, 8, 12, 17, 40)),
        *(("smolvlm", budget) for budget in (4, 20, 45, 60)),
        *((family, budget) for family in ("qwen2_5_vl", "qwen3_vl") for budget in (4, 15, 40)),
    ],
)
def test_no_image_takes_more_than_the_largest(family: str, budget: int | None) -> None:
    config, processor = MAKERS[family]()
    limit_image_tokens(processor, config, budget)
    most = image_tokens({"input_ids": largest_images(config, 1, 600, budget)[0]})
    assert budget is None or most <= budget
    draws = np.random.default_rng(0)
    counts: list[int] = []
    while len(counts) < 60:
        shape = tuple(int(edge) for edge in np.exp(draws.uniform(np.log(8), np.log(400), 2)))
        if budget is None or max(shape) / min(shape) <= budget:
            counts.append(image_tokens(process(processor, shape, rows=1)))
    assert max(counts) <= (budget if family.startswith("qwen") else most)
    assert max(counts) > 0.5 * most


LOWER: dict[str, tuple[str, Any]] = {  # family: the processor's setting, and a lower limit than the budget's
    "internvl": ("max_patches", 3),
    "smolvlm": ("size", {"longest_edge": 28}),
    "qwen3_vl": ("size", {"longest_edge": 5000, "shortest_edge": 100}),
}


@pytest.mark.parametrize("family", LOWER)
def test_a_limit_is_kept_when_it_is_lower_already(family: str) -> None:
    setting, lower = LOWER[family]
    config, processor = MAKERS[family]()
    setattr(processor.image_processor, setting, lower)
    limit_image_tokens(processor, config, 68)
    kept = getattr(processor.image_processor, setting)
    assert (kept if isinstance(lower, int) else {name: kept[name] for name in lower}) == lower


def settings(config: PretrainedConfig, processor: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return config.to_dict(), processor.image_processor.to_dict()


@pytest.mark.parametrize("family", MAKERS)
def test_without_a_budget_nothing_changes(family: str) -> None:
    config, processor = MAKERS[family]()
    before = settings(config, processor)
    limit_image_tokens(processor, config, None)
    assert settings(config, processor) == before


@pytest.mark.parametrize("family", MAKERS)
def test_limited_twice_is_limited_once(family: str) -> None:
    config, processor = MAKERS[family]()
    limit_image_tokens(processor, config, 40)
    once = settings(config, processor)
    limit_image_tokens(processor, config, 40)
    assert settings(config, processor) == once


def test_where_images_keep_their_size_the_largest_is_a_square_of_half_the_sample() -> None:
    ids_BS, tensors = largest_images(MAKERS["qwen2_5_vl"]()[0], 2, 100, None)
    assert (ids_BS == IMAGE).sum() == 2 * 49 and tensors["image_grid_thw"].tolist() == [[1, 14, 14]] * 2


SMALLEST = {"llava": 16, "llava_onevision": 36, "qwen2_5_vl": 4, "gemma3": 4, "internvl": 4, "smolvlm": 4}


@pytest.mark.parametrize(("family", "smallest"), SMALLEST.items())
def test_a_budget_under_the_smallest_image_is_refused(family: str, smallest: int) -> None:
    config, processor = MAKERS[family]()
    for refused in (
        lambda: limit_image_tokens(processor, config, smallest - 1),
        lambda: largest_images(config, 1, 500, smallest - 1),
    ):
        with pytest.raises(UserError, match=f"at least {smallest} tokens in this model; .* to {smallest - 1}") as error:
            refused()
        assert error.value.where == "data.max_image_tokens" and f"{smallest} or more" in str(error.value.fix)


def test_an_image_that_a_sample_does_not_hold_is_refused_with_both_ways_out() -> None:
    with pytest.raises(UserError, match="20 tokens do not hold an image of 54 and a question") as error:
        largest_images(internvl()[0], 1, 20, None)
    assert "at least 58, or set data.max_image_tokens (at least 4 here)" in str(error.value.fix)


def test_where_images_have_one_size_a_longer_sample_is_the_one_way_out() -> None:
    with pytest.raises(UserError, match="an image of 16") as error:
        largest_images(llava()[0], 1, 19, None)
    assert error.value.fix == "Plan with at least 20."


@pytest.mark.parametrize(
    "asked", [lambda c: limit_image_tokens(None, c, 100), lambda c: largest_images(c, 1, 500, None)]
)
def test_a_family_that_is_not_known_is_named(asked: Callable[[PretrainedConfig], object]) -> None:
    with pytest.raises(UserError, match="'blip-2' models take is not known"):
        asked(CONFIG_MAPPING["blip-2"]())


def test_a_family_that_is_not_known_needs_no_limit_without_a_budget() -> None:
    limit_image_tokens(None, CONFIG_MAPPING["blip-2"](), None)


def test_every_known_family_is_tested() -> None:
    """Here, or as a variant that goes through every stage."""
    variants = {path.stem for path in (ROOT / "tests" / "families" / "variants").glob("*.py")}
    assert set(MAKERS) <= set(FAMILIES) and set(FAMILIES) <= {*MAKERS, *variants}
