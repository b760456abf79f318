"""A checkpoint that is quantised already is loaded as such, or refused by its config; its bytes are no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from qmixlora.backbone import load_backbone, parts_of
from qmixlora.errors import UserError
from qmixlora.memory.architectures import config_of
from qmixlora.recipe import Model


def quantised_by(facts: Any, folder: Path, source: Path, *, inside: bool = False) -> str:
    """A copy of a checkpoint whose config says that it is quantised (that of its decoder, if `inside`)."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config["text_config"] if inside else config)["quantization_config"] = facts
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


FP4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "something new"}, "something new"),
        (INT8, "bitsandbytes, 8 bits"),
        (FP4, "bitsandbytes, 4 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits"),  # its scales are not
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    tmp_path: Path, backbone: Path, facts: dict[str, Any], told: str, quantization: Any, inside: bool
) -> None:
    spec = Model(id=quantised_by(facts, tmp_path, backbone, inside=inside), quantization=quantization)
    (tmp_path / "model.safetensors").unlink()
    for use in (load_backbone, config_of, parts_of):
        with pytest.raises(UserError) as refused:
            use(spec)
        assert refused.value.what == f"The checkpoint is itself quantised ({told})."
        assert "original 16-bit checkpoint" in refused.value.fix


@pytest.fixture(scope="module")
def in_double_nf4(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint in double NF4, whose layers are to compute in float16."""
    folder = tmp_path_factory.mktemp("nf4")
    shutil.copytree(backbone, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        backbone, quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


def test_double_nf4_is_loaded_and_computes_in_the_dtype_of_the_recipe(in_double_nf4: Path, backbone: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(in_double_nf4), dtype="float32"))
    own, _, _ = load_backbone(Model(id=str(backbone), dtype="float32"))
    layers = [model.get_submodule(path) for path in anatomy.targets]
    assert all(isinstance(layer, Linear4bit) and layer.compute_dtype == torch.float32 for layer in layers)
    path, x = anatomy.targets[0], torch.randn(3, layers[0].in_features)
    torch.testing.assert_close(model.get_submodule(path)(x), own.get_submodule(path)(x))


@pytest.mark.parametrize(
    "otherwise", [{"quantization": "none"}, {"keep": ["q_proj"]}, {"quantize_lm_head": "int8"}, {"stream_layers": 1}]
)
def test_double_nf4_is_refused_where_the_recipe_wants_something_else(
    in_double_nf4: Path, otherwise: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"itself quantised \(bitsandbytes, 4 bits\)") as refused:
        load_backbone(Model(id=str(in_double_nf4), dtype="float32", **otherwise))
    assert "without model.keep, memory levers and FSDP" in refused.value.fix


def test_double_nf4_is_not_shared_out(in_double_nf4: Path) -> None:
    with pytest.raises(UserError, match="itself quantised"):
        load_backbone(Model(id=str(in_double_nf4), dtype="float32"), to_shard=True)
