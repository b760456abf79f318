"""The parts of the families that people use are found by what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qmixlora.backbone import Anatomy, find_anatomy

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
VISION = {"out_hidden_size": 64, "depth": 1}
QWEN3_VISION = {**VISION, "deepstack_visual_indexes": [0]}
DECODER, TOWER, PROJECTOR = "model.language_model", "model.vision_tower", ("model.multi_modal_projector",)
MERGER = "model.visual.merger"
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {  # decoder, tower, projectors, config
    "llava": (DECODER, TOWER, PROJECTOR, {"text_config": {"model_type": "llama", **TEXT}}),
    "llava_onevision": (DECODER, TOWER, PROJECTOR, {}),
    "qwen2_5_vl": (DECODER, "model.visual", (MERGER,), {"text_config": TEXT, "vision_config": VISION}),
    "qwen3_vl": (
        DECODER,
        "model.visual",
        (MERGER, "model.visual.deepstack_merger_list.0"),
        {"text_config": TEXT, "vision_config": QWEN3_VISION},
    ),
    "smolvlm": (
        "model.text_model",
        "model.vision_model",
        ("model.connector",),
        {"text_config": {"model_type": "llama", **TEXT}},
    ),
    "gemma3": (DECODER, TOWER, PROJECTOR, {}),
    "internvl": (DECODER, TOWER, PROJECTOR, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def anatomy(family: str) -> Anatomy:
    with torch.device("meta"):
        return find_anatomy(AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**FAMILIES[family][3])))


def test_the_parts_have_their_paths(anatomy: Anatomy, family: str) -> None:
    language, vision, projectors, _ = FAMILIES[family]
    assert (anatomy.language, anatomy.vision, anatomy.projectors) == (language, (vision,), projectors)


def test_the_targets_are_the_linear_layers_of_the_decoder(anatomy: Anatomy) -> None:
    assert anatomy.targets and all(name.startswith(anatomy.language + ".") for name in anatomy.targets)
    assert {name.rpartition(".")[2] for name in anatomy.targets} >= {"q_proj", "o_proj", "down_proj"}


def test_head_and_embeddings_are_kept(anatomy: Anatomy) -> None:
    assert "lm_head" in anatomy.kept and f"{anatomy.language}.embed_tokens" in anatomy.kept
