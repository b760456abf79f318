"""What can be wrong with a backbone: levers that it does not have, and weights that are not what was asked for."""

from __future__ import annotations

import bitsandbytes as bnb
from torch import nn
from transformers import PreTrainedModel

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .anatomy import Anatomy
from .levers.quantized_head import PiecewiseLinear
from .levers.streaming import decoder_layers
from .nf4 import BLOCK


def check_levers(model: PreTrainedModel, anatomy: Anatomy, spec: Model) -> None:
    """Refuse memory levers that this model does not have (weights may be on meta).

    Raises:
        UserError: the embeddings are tied to lm_head, and one of the two is to lie elsewhere or in another precision;
            the embedding is of a kind that is not quantised; or more layers are to be streamed than there are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    levers = {
        "quantize_lm_head": spec.quantize_lm_head != "none",
        "quantize_embeddings": spec.quantize_embeddings != "none",
        "offload_embeddings": spec.offload_embeddings,
    }
    for name, pulled in levers.items():
        if pulled and head is not None and head.weight is embedding.weight:
            raise UserError(
                "This model's lm_head and input embeddings are one tensor, which is needed on the card in 16 bits.",
                where=f"model.{name}",
                fix="Leave quantize_lm_head, quantize_embeddings and offload_embeddings out; model.stream_layers and"
                " train.loss_chunk save memory in this model too.",
            )
    if levers["quantize_lm_head"] and type(head) is not nn.Linear:
        raise UserError(f"lm_head is a {type(head).__name__}, which is not quantised.", where="model.quantize_lm_head")
    if levers["quantize_embeddings"]:
        _check_embedding(embedding, spec)
    layers = len(decoder_layers(anatomy))
    if spec.stream_layers > layers:
        raise UserError(
            f"{spec.stream_layers} decoder layers are to be streamed, and the model has {layers}.",
            where="model.stream_layers",
            fix=f"Set it to {layers} or less.",
        )


def _check_embedding(embedding: nn.Module, spec: Model) -> None:
    if type(embedding) is not nn.Embedding:
        raise UserError(
            f"The input embedding is a {type(embedding).__name__}, which is not quantised.",
            where="model.quantize_embeddings",
            fix="Use model.offload_embeddings: true.",
        )
    if spec.quantize_embeddings == "nf4" and embedding.embedding_dim % BLOCK:
        raise UserError(
            f"The rows of the input embeddings have {embedding.embedding_dim} numbers, not whole blocks of {BLOCK}.",
            where="model.quantize_embeddings",
            fix="Use int8.",
        )


def check_quantized(model: nn.Module, anatomy: Anatomy) -> None:
    """Verify what is 4-bit and what is not, by class and dtype of the loaded modules.

    A head in pieces (`quantize_lm_head`) was asked for, and counts as such.

    Raises:
        UserError: a target is not NF4 with double quantisation, or something that was to be kept is quantised.
    """
    wrong = []
    asked = [name for name, module in model.named_modules() if isinstance(module, PiecewiseLinear)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        quantized = isinstance(module, bnb.nn.Linear4bit)
        kept = _within(name, anatomy.kept) and not _within(name, asked)
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


def _within(name: str, paths: tuple[str, ...] | list[str]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)


def _is_nf4_double(module: bnb.nn.Linear4bit) -> bool:
    state = module.weight.quant_state
    return state is not None and state.quant_type == "nf4" and bool(state.nested)


def check_cpu_rows(model: nn.Module, where: str) -> None:
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


def keep_cpu_weights_unpacked(model: nn.Module) -> None:
    """Forbid bitsandbytes' AVX512-bf16 repacking of 4-bit weights.

    An evaluation forward would repack them for good; after that a training forward through the layer has no graph and
    the gradients below it are lost in silence (bitsandbytes 0.50), and dimensions off the multiples of 64 crash.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
