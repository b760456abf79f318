"""A routing record by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qmixlora.mixlora.routing_record import RoutingRecord

NAMES = ("US$__vs_A$", "_\\$^$ \ud83d")  # as tasks and runs may have: no formulas, and half a surrogate pair


def record_by_hand(tasks: Sequence[str]) -> RoutingRecord:
    """Two snapshots with four factors: the first two tasks are alike and even, then apart; factor 3 is unused then.
    No sample is of a third task.
    """
    even = torch.eye(4).expand(2, 4, 4)
    apart = torch.stack([torch.diag(torch.tensor([2.0, 0, 0, 0])), torch.diag(torch.tensor([0.0, 1, 1, 0]))])
    record, unseen = RoutingRecord(tasks), len(tasks) - 2
    for step, mean_TEF, counts in ((5, even, [3.0, 3.0]), (10, apart, [2.0, 4.0])):
        mean_TEF = torch.cat([mean_TEF, torch.zeros(unseen, 4, 4)])
        record.add(step, {"model.layers.0.q": mean_TEF}, torch.tensor([*counts, *[0.0] * unseen]))
    return record
