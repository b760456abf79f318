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

from qmixlora.backbone import Anatomy, load_backbone, open_processor
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


def with_the_tokenizers_chat_template(folder: Path, backbone: Path) -> str:
    template = (backbone / "chat_template.jinja").read_text(encoding="utf-8")
    return with_chat_templates(without_chat_template(folder, backbone), template)


def with_a_chat_template_of_texts(folder: Path, backbone: Path) -> str:
    return with_chat_templates(without_chat_template(folder, backbone), "{{ messages[0].content }}")


def with_chat_templates(folder: str, template: str) -> str:
    """The folder, with a chat template for its tokenizer alone."""
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return folder


def with_named_chat_templates(folder: Path, backbone: Path) -> str:
    without_chat_template(folder, backbone)
    (folder / "additional_chat_templates").mkdir()
    for name in ("vqa", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text("{{ messages }}", encoding="utf-8")
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
        (with_the_tokenizers_chat_template, "(?s)no chat template.*which takes images: write that into .* by python"),
        (with_a_chat_template_of_texts, "(?s)no chat template.*no place for images"),
        (with_named_chat_templates, "(?s)none of which is called default: rag, vqa.*Save the one to use"),
        (with_pickled_weights, "safetensors"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(
    tmp_path: Path, backbone: Path, make: Callable[[Path, Path], str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(Model(id=make(tmp_path, backbone)))
    assert "model.id" in str(caught.value)


def test_what_is_said_of_a_chat_template_that_the_tokenizer_has_mends_it(tmp_path: Path, backbone: Path) -> None:
    spec = Model(id=with_the_tokenizers_chat_template(tmp_path, backbone))
    with pytest.raises(UserError) as refused:
        open_processor(spec, None)
    command = refused.value.fix.partition('python -c "')[2].removesuffix('"')
    exec(command)
    template = (backbone / "chat_template.jinja").read_text(encoding="utf-8")
    assert open_processor(spec, None).chat_template == template


def test_of_several_chat_templates_the_default_is_taken(tmp_path: Path, backbone: Path) -> None:
    template = (backbone / "chat_template.jinja").read_text(encoding="utf-8")
    folder = with_named_chat_templates(tmp_path, backbone)
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert open_processor(Model(id=folder), None).chat_template == template


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
