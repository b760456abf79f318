"""Input embeddings in host memory (`model.offload_embeddings`).

Shapes: V rows (words), D width, ... any axes of ids.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from .host_memory import host_like


class HostEmbedding(nn.Module):
    """An embedding whose rows are looked up on the CPU: ids are copied to the host, the selected rows to the device.

    The lookup is the model's own module, scales and all. It is kept out of reach of whatever walks over parameters, so
    that nobody moves its weight (`Trainer` does) or takes it for the place where the model is. The weight is not
    pinned: what is copied are rows that were gathered from it.
    """

    def __init__(self, lookup: nn.Embedding, device: torch.device) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = lookup.num_embeddings, lookup.embedding_dim
        self.device = device
        lookup.weight = nn.Parameter(host_like(lookup.weight.detach()), requires_grad=False)
        for name, buffer in list(lookup.named_buffers()):  # such as Gemma's scale
            setattr(lookup, name, host_like(buffer))
        self._lookup = [lookup]  # in a list: only modules themselves are registered
        self._fetched: tuple[weakref.ref[Tensor], Tensor] | None = None  # the last ids, and their copy on the host

    @property
    def weight(self) -> Tensor:
        """V x D, on the CPU."""
        return self._lookup[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        """... ids -> ... x D, on the device."""
        rows: Tensor = self._lookup[0](self._on_host(ids))
        return rows.to(self.device, non_blocking=True)

    def _on_host(self, ids: Tensor) -> Tensor:
        """The ids on the host, which waits for the device once a batch, though rows may be wanted twice: for the
        condition that the batch is routed on, and by the model. (Nobody writes into ids.)
        """
        if self._fetched is None or self._fetched[0]() is not ids:
            self._fetched = weakref.ref(ids), ids.to("cpu")
        return self._fetched[1]
