"""A routing record by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qmixlora.mixlora.routing_record import RoutingRecord


def record_by_hand(tasks: Sequence[str]) -> RoutingRecord:
    """Two snapshots of two tasks with four factors: alike and even, then apart; factor 3 is never used at the end."""
    even = torch.eye(4).expand(2, 4, 4)
    apart = torch.stack([torch.diag(torch.tensor([2.0, 0, 0, 0])), torch.diag(torch.tensor([0.0, 1, 1, 0]))])
    record = RoutingRecord(tasks)
    record.add(5, {"model.layers.0.q": even}, torch.tensor([3.0, 3.0]))
    record.add(10, {"model.layers.0.q": apart}, torch.tensor([2.0, 4.0]))
    return record
