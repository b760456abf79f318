"""The backbone is found, quantised as declared, and checked."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qmixlora.backbone import check_quantized, find_anatomy, load_backbone
from qmixlora.demo.backbone import make_config
from qmixlora.errors import UserError
from qmixlora.recipe import Model

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
VISION = {"out_hidden_size": 64, "depth": 1}
QWEN3_VISION = {**VISION, "deepstack_visual_indexes": [0]}
DECODER, TOWER, PROJECTOR = "model.language_model", "model.vision_tower", ("model.multi_modal_projector",)
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "llava": (DECODER, TOWER, PROJECTOR, {"text_config": {"model_type": "llama", **TEXT}}),
    "llava_onevision": (DECODER, TOWER, PROJECTOR, {}),
    "qwen2_5_vl": (
        DECODER,
        "model.visual",
        ("model.visual.merger",),
        {"text_config": TEXT, "vision_config": VISION},
    ),
    "qwen3_vl": (
        DECODER,
        "model.visual",
        ("model.visual.merger", "model.visual.deepstack_merger_list.0"),
        {"text_config": TEXT, "vision_config": QWEN3_VISION},
    ),
    "smolvlm": ("model.text_model", "model.vision_model", ("model.connector",), {}),
    "gemma3": (DECODER, TOWER, PROJECTOR, {}),
    "internvl": (DECODER, TOWER, PROJECTOR, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anatomy_of_families_people_use(family: str) -> None:
    language, vision, projectors, changes = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**changes))
    anatomy = find_anatomy(model)
    assert anatomy.language == language
    assert anatomy.vision == (vision,)
    assert anatomy.projectors == projectors
    assert anatomy.targets and all(name.startswith(language + ".") for name in anatomy.targets)
    assert {name.rpartition(".")[2] for name in anatomy.targets} >= {"q_proj", "o_proj", "down_proj"}
    assert "lm_head" in anatomy.kept and f"{language}.embed_tokens" in anatomy.kept


def test_what_is_quantised_and_what_is_not(backbone: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(backbone), dtype="bfloat16"))
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert name in anatomy.targets
            assert module.weight.dtype == torch.uint8
            assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
            assert module.compute_dtype == torch.bfloat16
            assert not module.support_avx512bf16_for_cpu
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            assert name not in anatomy.targets
            assert module.weight.dtype == torch.bfloat16, name
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == len(anatomy.targets) == 14
    assert not any(p.requires_grad for p in model.parameters())


def test_a_wrong_quantisation_is_found(backbone: Path) -> None:
    def loaded() -> tuple[Any, Any]:
        model, _, anatomy = load_backbone(Model(id=str(backbone), dtype="float32"))
        return model, anatomy

    def quantized(kind: str, double: bool) -> nn.Module:
        return bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind, compress_statistics=double).to("cpu")

    model, anatomy = loaded()
    model.model.vision_tower.encoder.layers[0].self_attn.q_proj = quantized("nf4", True)
    with pytest.raises(UserError, match=r"vision_tower.*is quantised and should not be"):
        check_quantized(model, anatomy)
    for kind, double in (("fp4", True), ("nf4", False)):
        model, anatomy = loaded()
        model.model.language_model.layers[0].self_attn.q_proj = quantized(kind, double)
        with pytest.raises(UserError, match="not NF4 with double quantisation"):
            check_quantized(model, anatomy)


def test_models_that_cannot_be_loaded(tmp_path: Path, backbone: Path) -> None:
    def fails(identifier: Path | str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_backbone(Model(id=str(identifier)))
        assert "model.id" in str(caught.value)

    fails(tmp_path, "no config.json")
    fails("nobody/nothing", "Cannot load the model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    fails(tmp_path / "text", "Cannot load the model")
    shutil.copytree(backbone, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    fails(tmp_path / "mute", "no chat template")
    shutil.copytree(backbone, tmp_path / "pickle")
    weights = tmp_path / "pickle" / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "pickle" / "pytorch_model.bin")
    weights.unlink()
    fails(tmp_path / "pickle", "safetensors")


def test_a_library_that_a_processor_lacks_is_named(tmp_path: Path, processor: Any) -> None:
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is here")
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
    with pytest.raises(UserError, match=r"requires the Torchvision library.*\n.*\n.*qmixlora\[vision\]"):
        load_backbone(Model(id=str(tmp_path), dtype="float32", quantization="none"))


def test_rows_that_the_cpu_kernel_gets_wrong_are_refused(tmp_path: Path, processor: Any) -> None:
    """And what is refused is wrong, with AVX-512: the day bitsandbytes gets it right, this test says so."""
    torch.manual_seed(0)
    weight = torch.randn(64, 160)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    by_rows = bnb.functional.dequantize_4bit(packed, state)
    state.shape = torch.Size((weight.numel(),))
    as_one = bnb.functional.dequantize_4bit(packed, state).view_as(weight)
    error = (as_one - weight).abs().max()
    assert error < 0.7
    if "512" in torch.backends.cpu.get_cpu_capability():
        assert (by_rows - weight).abs().max() > 2 * error

    config = make_config(processor.tokenizer, layers=1, width=64)
    config.text_config.intermediate_size = 160
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="rows of 160"):
        load_backbone(Model(id=str(tmp_path), dtype="float32"))
    load_backbone(Model(id=str(tmp_path), dtype="float32", quantization="none"))
