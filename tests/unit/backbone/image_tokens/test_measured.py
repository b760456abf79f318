"""Families that only their processors know are measured, and held to a budget by what their processors have."""

from __future__ import annotations

import pytest
import transformers
from PIL import Image

from qmixlora.backbone.image_tokens import FAMILIES, largest_images, limit_image_tokens, placeholder_of
from qmixlora.backbone.image_tokens.measured import Measured, _asked
from qmixlora.backbone.image_tokens.unmeasured import UNMEASURED
from qmixlora.errors import UserError
from qmixlora.memory.architectures import config_of
from qmixlora.recipe import Model
from tests.families.variant import variants

VARIANTS = variants()
TRIED = ("glm4v", "lfm2_vl", "llava_next")  # by area; by tiles or a longest image; by sizes that the config has, too


@pytest.mark.parametrize("name", [TRIED[0], *(pytest.param(name, marks=pytest.mark.long) for name in TRIED[1:])])
def test_images_keep_to_the_least_budget(name: str) -> None:
    config, processor = VARIANTS[name].build()
    assert config.model_type not in FAMILIES
    least = Measured(processor).smallest(config)
    limit_image_tokens(processor, config, least)
    counts = [
        int((_asked(processor, size)["input_ids"] == placeholder_of(config)).sum()) for size in ((900, 900), (90, 300))
    ]
    assert 0 < max(counts) <= least


def test_photographs_keep_to_a_budget_that_other_shapes_do_not_fill() -> None:
    """A square and shapes of 2:1, 3:1 and 4:1 have other grids of tiles, which have fewer."""
    config, processor = VARIANTS["qianfan_ocr"].build()
    limit_image_tokens(processor, config, 26)
    sizes = [(640, 480), (480, 640), (600, 400), (640, 360), (1000, 200), (90, 720), (1, 1)]
    counts = [int((_asked(processor, size)["input_ids"] == placeholder_of(config)).sum()) for size in sizes]
    assert 0 < max(counts) <= 26


def test_the_largest_image_is_planned_by_its_processor() -> None:
    config, processor = VARIANTS["vipllava"].build()
    ids_BS, tensors = largest_images(config, 2, 64, None, processor)
    assert int((ids_BS[0] == placeholder_of(config)).sum()) == 16
    assert tensors["pixel_values"].shape == (2, 3, 28, 28)


def test_slices_of_an_image_are_those_of_the_processor() -> None:
    processor = transformers.MiniCPMV4_6ImageProcessor()  # by its own defaults
    config = config_of(Model(id="openbmb/MiniCPM-V-4.6"))
    planned = UNMEASURED["minicpmv4_6"].largest(config, None, 4096)
    given = processor(Image.new("RGB", (1344, 1344)), return_tensors="pt")
    assert {name: tensor.shape for name, tensor in planned.tensors.items()} == {
        name: given[name].shape for name in ("pixel_values", "target_sizes")
    }
    assert planned.ids_L.count(config.image_token_id) == int(given["target_sizes"].prod(dim=-1).sum()) // 16


@pytest.mark.long
def test_a_batch_of_planned_images_grows_as_the_processor_lets_it() -> None:
    config, processor = VARIANTS["minicpmv4_6"].build()
    one, two = (largest_images(config, rows, 400, None, processor)[1]["pixel_values"] for rows in (1, 2))
    grown = [more // own for own, more in zip(one.shape, two.shape, strict=True)]
    assert sorted(grown) == [1, 1, 1, 2] and grown[0] == 1  # packed: along another dimension than the first


def test_a_mask_of_every_token_is_as_long_as_the_planned_sample() -> None:
    config, processor = VARIANTS["mllama"].build()
    for known in (processor, None):
        ids_BS, tensors = largest_images(config, 2, 50, None, known)
        assert ids_BS.shape == (2, 50) == tensors["cross_attention_mask"].shape[:2]


def test_lists_beside_tensors_are_planned_for_every_image() -> None:
    config, processor = VARIANTS["unlimited_ocr"].build()
    assert len(largest_images(config, 2, 1400, None, processor)[1]["num_local_patches"]) == 2


def test_a_family_without_a_processor_is_refused_by_name() -> None:
    config, _ = VARIANTS["vipllava"].build()
    with pytest.raises(UserError, match="'vipllava' models take is not known"):
        largest_images(config, 2, 64, None)


def test_a_config_that_names_no_image_token_is_refused() -> None:
    with pytest.raises(UserError, match="'llama' models does not say which token stands for an image"):
        placeholder_of(transformers.LlamaConfig())
