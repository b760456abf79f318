"""Checks of a loaded backbone: its weights have the precision that was asked for, and are computed rightly here."""

from __future__ import annotations

from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from qmixlora.errors import UserError, some

from .anatomy import Anatomy, within
from .experts import NF4Experts
from .levers.quantized_head import PiecewiseLinear
from .nf4 import quant_state_of


def check_quantized(model: nn.Module, anatomy: Anatomy, *, vision: bool = False) -> None:
    """Verify which layers are 4-bit and which are not, by class and dtype of the loaded modules.

    A head in pieces (`quantize_lm_head`) was asked for, and may be quantised; with `vision`, so was the tower.

    Raises:
        UserError: a target is not NF4 with double quantisation, or a module that was to be kept is quantised.
    """
    wrong = []
    asked = [name for name, module in model.named_modules() if isinstance(module, PiecewiseLinear)]
    asked += anatomy.vision if vision else ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if not isinstance(module, Linear4bit):
            if name in anatomy.in_nf4:
                wrong.append(f"{name} is {module.weight.dtype}, not NF4")
        elif within(name, anatomy.kept) and not within(name, asked):
            wrong.append(f"{name} is quantised and should not be")
        elif not _is_nf4_double(module):
            wrong.append(f"{name} is 4-bit, but not NF4 with double quantisation")
    wrong += [f"{name} is not NF4" for name in anatomy.experts_in_nf4 if not _are_nf4(model, name)]
    if wrong:
        raise UserError(
            f"The backbone is not quantised as declared: {some(wrong, 3, '; ')}.",
            where="model.quantization",
            fix="If the checkpoint is already quantised, use the original 16-bit one.",
        )


def _are_nf4(model: nn.Module, experts: str) -> bool:
    path, _, own = experts.rpartition(".")
    module = getattr(model.get_submodule(path), own)
    return isinstance(module, NF4Experts) and _is_nf4_double(module)


def _is_nf4_double(module: nn.Module) -> bool:
    state = quant_state_of(module)  # none before it is quantised
    return state is not None and state.quant_type == "nf4" and bool(state.nested)


def check_cpu_rows(model: nn.Module, where: str) -> None:
    """Refuse rows that are not whole blocks, which bitsandbytes' CPU kernel computes wrongly without a word.

    It starts the scales of every row anew, where the quantiser runs on from row to row (bitsandbytes 0.50.2, AVX-512;
    a row of 160 is off by several times the quantisation error).
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            block = quant_state_of(module).blocksize
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
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
