"""The kinds of models that are refused by name, from their config alone, each with what to use in its place."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .prequantized import check_prequantized

GEMMA = "Use Gemma 3 or Gemma 4."
REFUSED = {  # model types that train otherwise than a decoder which writes on, why, and what to use
    "paligemma": (
        "PaliGemma reads a question in both directions and takes the answer apart from it, which a chat template "
        "cannot say: answers would be visible while they are learned.",
        "Use Gemma 3 or another model with a chat template.",
    ),
    "diffusion_gemma": (
        "DiffusionGemma writes a block of tokens at once, out of noise: the loss at the next token does not teach it.",
        GEMMA,
    ),
    "shieldgemma2": (
        "ShieldGemma 2 is a classifier, whose processor asks the questions itself.",
        GEMMA,
    ),
    "pi0": ("PI0 gives movements of a robot, no text.", GEMMA),
    "evolla": ("Evolla reads proteins, no images.", GEMMA),
}
HUB_CODE = {  # model types of code in hub repositories, and what transformers itself has of the family
    "minicpmv": "openbmb/MiniCPM-V-4.6",
    "minicpmo": "openbmb/MiniCPM-V-4.6",
    "deepseek_vl_v2": "deepseek-community/DeepSeek-OCR-2",
    "deepseekocr": "deepseek-community/DeepSeek-OCR-2",
    "multi_modality": "deepseek-community/Janus-Pro-7B or deepseek-community/deepseek-vl-7b-chat",
    "internvl_chat": "the checkpoint of the same size whose name ends in -HF, such as OpenGVLab/InternVL3_5-8B-HF",
    "molmo": "allenai/Molmo2-8B",
    "ovis": "thisisiron/Ovis2-8B-hf",
    "h2ovl_chat": "OpenGVLab/InternVL3_5-8B-HF",
    **dict.fromkeys(("llava_llama", "llava_mistral"), "llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}
AUTO = AutoModelForImageTextToText.__name__


def check_kind(config: PretrainedConfig, where: str) -> None:
    """Refuse a model whose kind cannot be tuned. Raises UserError."""
    refused = REFUSED.get(config.model_type)
    text = config.sub_configs.get("text_config") and getattr(config, "text_config", None)
    known = type(config) in AutoModelForImageTextToText._model_mapping or AUTO in _auto_map(config.to_dict())
    if refused is not None:
        why, fix = refused
    elif not known:
        why, fix = f"{AUTO} has no class for {config.model_type!r} models.", _use(config.model_type)
    elif config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        why = (
            f"{config.model_type!r} models are encoder-decoders: the question goes into an encoder and the answer into "
            "a decoder of its own, where qmixlora trains one decoder that reads both."
        )
        fix = "Use a decoder-only model, such as SmolVLM 2 or Qwen3-VL of the same size."
    else:
        return
    raise UserError(why, where=f"model.id: {where}", fix=fix)


def read_config(spec: Model, **source: Any) -> PretrainedConfig:
    """The config of a model on the hub or in a folder, of a kind that can be tuned; `source` as `from_pretrained`.

    Raises:
        UserError: its kind cannot be tuned, or its weights are quantised otherwise than the recipe says.
        OSError, ValueError: it cannot be read.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(spec.id, **source)
    except (ValueError, KeyError):
        _check_hub_code(spec)
        raise
    except (AttributeError, TypeError, StrictDataclassError) as error:  # of a value that its class has no use for
        raise ValueError(f"its config.json holds what transformers cannot read: {error}") from error
    check_kind(config, spec.id)
    check_prequantized(config, spec)
    return config


def _check_hub_code(spec: Model) -> None:
    """Refuse a model whose class is code of its repository, and none that is asked for an image and text."""
    facts, _ = PretrainedConfig.get_config_dict(spec.id, revision=spec.revision)
    kind, auto = str(facts.get("model_type", "")), _auto_map(facts)
    if kind in HUB_CODE or (auto and AUTO not in auto):
        raise UserError(
            f"{kind!r} is no class of transformers, but code of the model's own repository"
            + (f", which has none for {AUTO}." if AUTO not in auto else "."),
            where=f"model.id: {spec.id}",
            fix=_use(kind),
        )


def _auto_map(facts: dict[str, Any]) -> dict[str, Any]:
    return facts.get("auto_map") or {}


def _use(kind: str) -> str:
    return f"Use {HUB_CODE.get(kind, 'a model that transformers has a class for, such as Qwen/Qwen3-VL-8B-Instruct')}."
