"""The backbone is loaded and quantised as declared; what cannot be loaded is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qmixlora.backbone import Anatomy, load_backbone
from qmixlora.errors import UserError
from qmixlora.recipe import Model


@pytest.fixture(scope="module")
def loaded(backbone: Path) -> tuple[PreTrainedModel, Anatomy]:
    model, _, anatomy = load_backbone(Model(id=str(backbone), dtype="bfloat16"))
    return model, anatomy


def test_the_targets_are_in_double_nf4(loaded: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = loaded
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert set(quantized) == set(anatomy.targets) and len(quantized) == 14
    for module in quantized.values():
        assert module.weight.dtype == torch.uint8
        assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
        assert module.compute_dtype == torch.bfloat16


def test_quantised_weights_keep_the_layout_that_every_kernel_reads(loaded: tuple[PreTrainedModel, Anatomy]) -> None:
    model, _ = loaded
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))


def test_everything_else_keeps_the_dtype_of_the_recipe(loaded: tuple[PreTrainedModel, Anatomy]) -> None:
    model, _ = loaded
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and not isinstance(module, bnb.nn.Linear4bit):
            assert module.weight.dtype == torch.bfloat16, name


def test_nothing_of_the_backbone_is_trained(loaded: tuple[PreTrainedModel, Anatomy]) -> None:
    assert not any(p.requires_grad for p in loaded[0].parameters())


def not_there(folder: Path, backbone: Path) -> str:
    return "nobody/nothing"


def empty(folder: Path, backbone: Path) -> str:
    return str(folder)


def of_text_alone(folder: Path, backbone: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return str(folder)


def without_chat_template(folder: Path, backbone: Path) -> str:
    shutil.copytree(backbone, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


def with_pickled_weights(folder: Path, backbone: Path) -> str:
    shutil.copytree(backbone, folder, dirs_exist_ok=True)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_there, "Cannot load the model"),
        (empty, "no config.json"),
        (of_text_alone, "has no class for 'llama' models"),
        (without_chat_template, "no chat template"),
        (with_pickled_weights, "safetensors"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(
    tmp_path: Path, backbone: Path, make: Callable[[Path, Path], str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(Model(id=make(tmp_path, backbone)))
    assert "model.id" in str(caught.value)


LOAD = """
import sys
from importlib.util import find_spec
from qmixlora.backbone import load_backbone
from qmixlora.errors import UserError
from qmixlora.recipe import Model
try:
    load_backbone(Model(id=sys.argv[1], dtype="float32", quantization="none"))
except UserError as error:
    print(error)
print("torchvision is here" if find_spec("torchvision") else "")
"""


@pytest.mark.long
def test_without_torchvision_the_error_says_what_to_install(tmp_path: Path, processor: Any) -> None:
    """In a process that does not look into the tests' own folder of packages."""
    config = CONFIG_MAPPING["qwen2_5_vl"](
        text_config={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
        image_token_id=499, video_token_id=498, vision_start_token_id=497, vision_end_token_id=496,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    kinds = {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kinds), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    if "torchvision is here" in done.stdout:
        pytest.skip("the environment has a torchvision of its own")
    assert "requires the Torchvision library" in done.stdout
    assert "qmixlora[vision]" in done.stdout.partition("fix:")[2]
