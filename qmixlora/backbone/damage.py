"""What NF4 does to a model's layers, kind by kind: the error of their weights, and of their outputs on some inputs.

Shapes: O out-features, I in-features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .nf4 import BLOCK

PIECE = 2**22  # weights at a time: bitsandbytes' quantiser for the CPU takes 12 bytes for each


@dataclass(frozen=True)
class KindError:
    """The relative errors (by their norms) of one kind of layer: of its weights, in the mean over layers and in the
    worst one, and of its outputs, in the mean, where there were inputs. `share` is of the decoder's quantised weights.
    """

    kind: str
    layers: int
    share: float
    weights: float
    worst: float
    worst_layer: str
    outputs: float | None = None


def nf4_damage(model: nn.Module, anatomy: Anatomy, run: Callable[[], object] | None = None) -> list[KindError]:
    """Measure a model in 16 or 32 bits that NF4 would hold (`Anatomy.in_nf4`), the worst kind first; experts without
    outputs. `run` computes with the model: every layer's output is compared on the input that it gets there.
    """
    outputs = _output_errors(model, anatomy, run) if run is not None else {}
    errors: dict[str, list[tuple[str, float, int]]] = {}
    for name, weight in _weights(model, anatomy):
        errors.setdefault(kind_of(name, anatomy), []).append((name, _error(weight), weight.numel()))
    whole = sum(count for kind in errors.values() for _, _, count in kind)
    kinds = []
    for kind, layers in errors.items():
        worst = max(layers, key=lambda layer: layer[1])
        of_outputs = [outputs[name] for name, _, _ in layers if name in outputs]
        kinds.append(
            KindError(
                kind,
                len(layers),
                sum(count for _, _, count in layers) / whole,
                sum(error for _, error, _ in layers) / len(layers),
                worst[1],
                worst[0],
                sum(of_outputs) / len(of_outputs) if of_outputs else None,
            )
        )
    return sorted(kinds, key=lambda kind: -max(kind.weights, kind.outputs or 0))


def kind_of(name: str, anatomy: Anatomy) -> str:
    """A layer's name inside a decoder layer, other numbers taken off: `self_attn.q_proj`."""
    inside = re.sub(r"^\.?\w+\.\d+\.", "", name.removeprefix(anatomy.language))
    return re.sub(r"\.\d+(?=\.|$)", ".*", inside)


def _weights(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[str, Tensor]]:
    for path in anatomy.in_nf4:
        yield path, model.get_parameter(f"{path}.weight").detach()
    for name in anatomy.experts_in_nf4:
        yield name, model.get_parameter(name).detach()


@torch.no_grad()
def _output_errors(model: nn.Module, anatomy: Anatomy, run: Callable[[], object]) -> dict[str, float]:
    squares: dict[str, list[float]] = {path: [0.0, 0.0] for path in anatomy.in_nf4}

    def compare(path: str, layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        right = x @ layer.weight.float().T
        off = x @ (_round_trip(layer.weight).float() - layer.weight.float()).T
        squares[path][0] += float(off.square().sum())
        squares[path][1] += float(right.square().sum())

    hooks = []
    for path in anatomy.in_nf4:
        layer = model.get_submodule(path)
        hooks.append(layer.register_forward_pre_hook(lambda module, args, path=path: compare(path, module, args)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: (off / all_) ** 0.5 for path, (off, all_) in squares.items() if all_ > 0}


def _error(weight: Tensor) -> float:
    off, whole = 0.0, 0.0
    for piece in weight.reshape(-1).split(PIECE):
        off += float((_round_trip(piece).float() - piece.float()).square().sum())
        whole += float(piece.float().square().sum())
    return (off / whole) ** 0.5 if whole else 0.0


def _round_trip(weight: Tensor) -> Tensor:
    """A weight through NF4 with double quantisation and back, as one row (its end filled up to a whole block)."""
    row = weight.detach().reshape(1, -1)
    row = nn.functional.pad(row, (0, -row.numel() % BLOCK))
    packed, state = bnb.functional.quantize_4bit(row, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    back: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return back.view(-1)[: weight.numel()].view(weight.shape)
