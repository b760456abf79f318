"""The MLP of a decoder layer some tokens at a time (`train.mlp_chunk`), as in ALST's TiledMLP (arXiv 2506.13996).

Its inside is several times as wide as its input, and exists for one chunk at a time: a chunk keeps its input alone and
is computed again in its own backward pass. (Under activation checkpointing that is the second time.)

Shapes: B batch, S sequence, H width of the decoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qmixlora.errors import UserError

from ..anatomy import Anatomy

Forward = Callable[[Tensor], Tensor]


class Context(Protocol):
    """The batch that adapted layers know of (`RoutingContext`)."""

    def at_columns(self, columns: slice) -> AbstractContextManager[None]: ...


def chunk_mlps(backbone: nn.Module, anatomy: Anatomy, tokens: int | None) -> None:
    """Run the MLP of every decoder layer at most so many tokens at a time (None: all at once), from now on.

    `backbone` is the model without PEFT around it.

    Raises:
        UserError: a layer has no MLP of its own: experts, or one that is not found.
    """
    if tokens is None:
        return
    for path in mlp_paths(backbone, anatomy):
        mlp: Any = backbone.get_submodule(path)
        mlp.forward = _in_chunks(type(mlp).forward.__get__(mlp), tokens, _context_of(mlp))


def mlp_paths(backbone: nn.Module, anatomy: Anatomy) -> list[str]:
    """The MLP of every decoder layer: the child whose linear layers are its own children, and whose forward takes
    hidden states and nothing else (attention takes masks and positions, a block of experts has its layers deeper).

    Raises UserError as `chunk_mlps`.
    """
    found = []
    for layer, targets in anatomy.layers.items():
        children = {path.removeprefix(f"{layer}.").rpartition(".")[0] for path in targets}
        candidates = [f"{layer}.{child}" for child in sorted(children) if child]
        mlps = [path for path in candidates if _is_mlp(backbone.get_submodule(path), path, anatomy)]
        if len(mlps) != 1:
            names = ", ".join(type(backbone.get_submodule(path)).__name__ for path in candidates)
            raise UserError(
                f"No MLP that could be computed some tokens at a time is found in {layer}, among {names or 'nothing'}.",
                where="train.mlp_chunk",
                fix="Set train.mlp_chunk: null for this model.",
            )
        found += mlps
    return found


def _is_mlp(module: nn.Module, path: str, anatomy: Anatomy) -> bool:
    inside = [target for target in anatomy.targets if target.startswith(f"{path}.")]
    flat = len(inside) > 1 and all("." not in target.removeprefix(f"{path}.") for target in inside)
    lists = any(isinstance(part, nn.ModuleList) for part in module.children())
    experts = "expert" in path.rpartition(".")[2] or any("expert" in name for name, _ in module.named_modules())
    takes = [p for name, p in inspect.signature(type(module).forward).parameters.items() if name != "self"]
    return flat and not lists and not experts and len(takes) == 1 and takes[0].kind == takes[0].POSITIONAL_OR_KEYWORD


def _context_of(mlp: nn.Module) -> Context | None:
    """The routing that the adapted layers in an MLP read, if there are any."""
    contexts = (getattr(module, "mixlora_context", None) for module in mlp.modules())
    return next((context for context in contexts if context is not None), None)


def _in_chunks(forward: Forward, tokens: int, context: Context | None) -> Forward:
    def on_columns(x_BSH: Tensor, start: int) -> Tensor:
        if context is None:
            return forward(x_BSH)
        with context.at_columns(slice(start, start + x_BSH.shape[1])):
            return forward(x_BSH)

    def run(x_BSH: Tensor) -> Tensor:
        columns = max(1, tokens // len(x_BSH))
        if x_BSH.dim() != 3 or x_BSH.shape[1] <= columns:
            return forward(x_BSH)
        starts = range(0, x_BSH.shape[1], columns)
        chunks = zip(x_BSH.split(columns, dim=1), starts, strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([on_columns(x, start) for x, start in chunks], dim=1)
        done = [checkpoint(on_columns, x, start, use_reentrant=False) for x, start in chunks]
        return torch.cat(done, dim=1)

    return run
