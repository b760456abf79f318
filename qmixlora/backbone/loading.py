"""Load a backbone in NF4, and verify that what came out is what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .anatomy import Anatomy, find_anatomy


def load_backbone(spec: Model, *, offload: bool = False) -> tuple[PreTrainedModel, ProcessorMixin, Anatomy]:
    """The frozen backbone, its processor and its anatomy; on the GPU if there is one, else on the CPU.

    With `offload`, for inference alone, what does not fit the GPU stays in host memory or on the disk (accelerate).

    With `quantization: nf4` every linear layer of the decoder is a bitsandbytes `Linear4bit` (NF4, double
    quantisation); vision tower, projector, embeddings and lm_head keep `spec.dtype`. Nothing is upcast. safetensors
    files only.

    Raises:
        UserError: the model cannot be found or read, is of another kind, or is not quantised as declared.
    """
    folder = Path(spec.id)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError("This folder holds no model (no config.json).", where=f"model.id: {spec.id}")
    source: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.id, **source)
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config, trust_remote_code=spec.trust_remote_code)
        anatomy = find_anatomy(skeleton)
        model = AutoModelForImageTextToText.from_pretrained(
            spec.id,
            dtype=getattr(torch, spec.dtype),
            quantization_config=_quantization(spec, anatomy),
            attn_implementation=spec.attention,
            device_map=_placement(offload),
            use_safetensors=True,
            **source,
        )
        processor = AutoProcessor.from_pretrained(spec.id, **source)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"Cannot load the model: {error}",
            where=f"model.id: {spec.id}",
            fix="Give a hub id (and be online once, or logged in if it is gated) or a local folder with config.json,"
            " safetensors weights and processor files.",
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise UserError(
            "The model's processor has no chat template.",
            where=f"model.id: {spec.id}",
            fix="Use an instruction-tuned checkpoint, or add chat_template.jinja to a local copy.",
        )
    model.requires_grad_(False)
    model.config.use_cache = True
    keep_cpu_weights_unpacked(model)
    if spec.quantization == "nf4":
        check_quantized(model, anatomy)
        _check_cpu_rows(model, spec.id)
    return model, processor, anatomy


def _placement(offload: bool) -> Any:
    if not torch.cuda.is_available():
        return {"": "cpu"}
    return "auto" if offload else {"": "cuda:0"}


def _quantization(spec: Model, anatomy: Anatomy) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        # full paths: transformers matches from the start of the whole name, or as a suffix, never in the middle
        llm_int8_skip_modules=list(anatomy.kept),
    )


def check_quantized(model: nn.Module, anatomy: Anatomy) -> None:
    """Verify what is 4-bit and what is not, by class and dtype of the loaded modules.

    Raises:
        UserError: a target is not NF4 with double quantisation, or something that was to be kept is quantised.
    """
    wrong = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        quantized = isinstance(module, bnb.nn.Linear4bit)
        kept = any(name == path or name.startswith(path + ".") for path in anatomy.kept)
        if quantized and kept:
            wrong.append(f"{name} is quantised and should not be")
        elif not quantized and name in anatomy.targets:
            wrong.append(f"{name} is {module.weight.dtype}, not NF4")
        elif quantized and not _is_nf4_double(module):
            wrong.append(f"{name} is 4-bit, but not NF4 with double quantisation")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(
            f"The backbone is not quantised as declared: {'; '.join(wrong[:3])}{more}.",
            where="model.quantization",
            fix="If the checkpoint is already quantised, use the original 16-bit one.",
        )


def _check_cpu_rows(model: nn.Module, where: str) -> None:
    """Refuse what bitsandbytes' CPU kernel computes wrongly, without a word: rows that are not whole blocks.

    It starts the scales of every row anew, where the quantiser runs on from row to row (bitsandbytes 0.50.2, AVX-512;
    a row of 160 is off by several times the quantisation error).
    """
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.weight.device.type == "cpu":
            block = module.weight.quant_state.blocksize
            if module.in_features % block:
                raise UserError(
                    f"{name} has rows of {module.in_features}: on a CPU, bitsandbytes computes NF4 layers wrongly "
                    f"whose rows are not a multiple of {block}.",
                    where=f"model.id: {where}",
                    fix="Use a GPU, a model with other sizes, or model.quantization: none.",
                )


def _is_nf4_double(module: bnb.nn.Linear4bit) -> bool:
    state = module.weight.quant_state
    return state is not None and state.quant_type == "nf4" and bool(state.nested)


def keep_cpu_weights_unpacked(model: nn.Module) -> None:
    """Forbid bitsandbytes' AVX512-bf16 repacking of 4-bit weights.

    An evaluation forward would repack them for good; after that a training forward through the layer has no graph and
    the gradients below it are lost in silence (bitsandbytes 0.50), and dimensions off the multiples of 64 crash.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
