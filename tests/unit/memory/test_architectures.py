"""The table of configurations: each is the published model's, to the parameter."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from qmixlora.backbone import find_anatomy
from qmixlora.memory.architectures import ARCHITECTURES, config_of
from qmixlora.recipe import Model

PUBLISHED = {  # billions of parameters, as the hub shows them for the checkpoints' safetensors files
    "llava-hf/llava-1.5-7b-hf": 7.06,
    "llava-hf/llava-1.5-13b-hf": 13.4,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 0.894,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33.5,
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3-VL-32B-Instruct": 33.4,
    "google/gemma-3-4b-it": 4.30,
    "google/gemma-3-12b-it": 12.2,
    "google/gemma-3-27b-it": 27.4,
    "OpenGVLab/InternVL3-1B-hf": 0.938,
    "OpenGVLab/InternVL3-2B-hf": 2.09,
    "OpenGVLab/InternVL3-8B-hf": 7.94,
    "OpenGVLab/InternVL3-14B-hf": 15.1,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 0.507,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2.25,
}


REMEMBERED = {  # the same, as remembered; those of Qwen3.5 count layers that transformers leaves out (MTP)
    "Qwen/Qwen3.5-0.8B": 0.87,
    "Qwen/Qwen3.5-2B": 2.27,
    "Qwen/Qwen3.5-4B": 4.66,
    "Qwen/Qwen3.5-9B": 9.65,
    "Qwen/Qwen3.5-27B": 27.8,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 31.1,
    "google/gemma-4-E2B-it": 5.1,
    "google/gemma-4-E4B-it": 8.0,
    "google/gemma-4-31B-it": 31.3,
    "OpenGVLab/InternVL3_5-1B-HF": 1.06,
    "OpenGVLab/InternVL3_5-2B-HF": 2.35,
    "OpenGVLab/InternVL3_5-4B-HF": 4.73,
    "OpenGVLab/InternVL3_5-8B-HF": 8.53,
    "OpenGVLab/InternVL3_5-14B-HF": 15.1,
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": 3.85,
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": 8.92,
    "mistralai/Ministral-3-14B-Instruct-2512-BF16": 13.9,
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": 24.0,
    "zai-org/GLM-4.1V-9B-Thinking": 10.3,
    "zai-org/GLM-4.6V-Flash": 10.3,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7.57,
    "HuggingFaceM4/Idefics3-8B-Llama3": 8.46,
    "LiquidAI/LFM2.5-VL-1.6B": 1.6,
    "openbmb/MiniCPM-V-4.6": 1.3,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10.7,
    "PaddlePaddle/PaddleOCR-VL": 0.96,
}


def on_meta(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config_of(Model(id=name)))
    return model


def billions(model: PreTrainedModel) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in REMEMBERED])
def test_a_remembered_model_has_about_its_published_size_and_an_anatomy(name: str) -> None:
    model = on_meta(name)
    assert billions(model) == pytest.approx(REMEMBERED[name], rel=0.06)
    anatomy = find_anatomy(model)
    assert anatomy.projectors and len(anatomy.layers) == model.config.get_text_config().num_hidden_layers
    assert bool(anatomy.experts) == ("A3B" in name)


def test_every_model_of_the_table_is_compared_with_its_published_size() -> None:
    assert {*ARCHITECTURES} <= {*PUBLISHED, *REMEMBERED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_of_the_table_has_its_published_size_and_an_anatomy(name: str) -> None:
    model, config = on_meta(name), config_of(Model(id=name))
    assert billions(model) == pytest.approx(PUBLISHED[name], rel=0.005)
    anatomy = find_anatomy(model)
    layers = config.text_config.num_hidden_layers
    assert len(anatomy.targets) == 7 * layers and anatomy.projectors and not set(anatomy.projectors) & {*anatomy.vision}


def test_a_configuration_can_be_changed_without_changing_the_table() -> None:
    first = config_of(Model(id="google/gemma-3-4b-it"))
    first.text_config.rope_parameters["full_attention"]["factor"] = 1.0
    assert config_of(Model(id="google/gemma-3-4b-it")).text_config.rope_parameters["full_attention"]["factor"] == 8.0
