"""The table of configurations: each is the published model's, to the parameter."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_the_table_has_its_published_size_and_an_anatomy(name: str) -> None:
    config = config_of(Model(id=name))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(PUBLISHED[name], rel=0.005)
    anatomy = find_anatomy(model)
    layers = config.text_config.num_hidden_layers
    assert len(anatomy.targets) == 7 * layers and anatomy.projectors and not set(anatomy.projectors) & {*anatomy.vision}


def test_a_configuration_can_be_changed_without_changing_the_table() -> None:
    first = config_of(Model(id="google/gemma-3-4b-it"))
    first.text_config.rope_parameters["full_attention"]["factor"] = 1.0
    assert config_of(Model(id="google/gemma-3-4b-it")).text_config.rope_parameters["full_attention"]["factor"] == 8.0
