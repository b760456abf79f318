"""Siblings: layers that read the same input (q, k and v; gate and up), and so share the dropout on it, the cast of
their factor pools A and one product with all of these.

Shapes: B batch, S sequence, I in-features, E factors in a pool, G siblings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import Linear

SIBLINGS = (  # names that layers of one module have where they read the same input
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # linear attention
)


def join_siblings(layer: Linear, parent: nn.Module, name: str) -> None:
    """Have a layer that is to be called `name` in its parent share one list with its siblings there."""
    for sibling in (getattr(parent, other, None) for names in SIBLINGS if name in names for other in names):
        if (joined := getattr(sibling, "mixlora_siblings", None)) and joined[0].in_features == layer.in_features:
            joined.append(layer)
            layer.mixlora_siblings = joined
            return


def stacked_pools(layer: Linear, adapter_name: str) -> Tensor:
    """The pools A of a layer and its siblings, one after the other (G E x I)."""
    pools = [sibling.mixlora_A[adapter_name] for sibling in _with_adapter(layer, adapter_name)]
    return pools[0] if len(pools) == 1 else torch.cat(pools)


class Projections:
    """`x A^T` of siblings (B x S x E each), kept until its layer takes it, of the latest input of every adapter.

    A sibling that reads another input after all (k and v of a cross-attention) finds nothing here and starts anew.
    """

    def __init__(self) -> None:
        self._of: dict[str, tuple[Tensor, dict[nn.Module, Tensor]]] = {}

    def take(self, layer: Linear, adapter_name: str, x: Tensor) -> Tensor | None:
        """What is kept for a layer with this very input."""
        kept, own = self._of.get(adapter_name, (None, {}))
        if kept is not x or layer not in own:
            return None
        h_BSE = own.pop(layer)
        if not own:  # the input and its graph are kept no longer than they are needed
            del self._of[adapter_name]
        return h_BSE

    def keep(self, layer: Linear, adapter_name: str, x: Tensor, h_BSX: Tensor) -> None:
        """Keep the product of an input with the stacked pools, in place of what was kept before."""
        siblings = _with_adapter(layer, adapter_name)
        parts = h_BSX.chunk(len(siblings), dim=-1)
        self._of[adapter_name] = x, dict(zip(siblings, parts, strict=True))


def _with_adapter(layer: Linear, adapter_name: str) -> list[Linear]:
    return [sibling for sibling in layer.mixlora_siblings if adapter_name in sibling.mixlora_config]
