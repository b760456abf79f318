"""MixLoRA as slow loops, written from the equations of the paper (arXiv 2402.15896) and of docs/method.md.

One sample at a time, one slot at a time; no batching, no masks as tensors, nothing shared with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits: list[Tensor]) -> list[Tensor]:
    top = max(float(logit.detach()) for logit in logits)
    powers = [torch.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers]


def top(scores: list[Tensor], r: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -float(scores[e].detach()))[:r]


def gate(scores: list[Tensor], chosen: list[int], kind: str) -> list[Tensor]:
    if kind == "hard":
        return [torch.ones(()) for _ in chosen]
    if kind == "straight_through":
        return [torch.ones(()) + scores[e] - scores[e].detach() for e in chosen]
    mean = sum(scores[e] for e in chosen) / len(chosen)
    return [scores[e] / mean for e in chosen]


def update(
    x_SI: Tensor, condition: Tensor, parameters: dict[str, Tensor], *, r: int, alpha: float, pairing: str, kind: str
) -> Tensor:
    """The adapter's contribution to one sample's output (S x O)."""
    A, B = parameters["mixlora_A"], parameters["mixlora_B"]
    E = len(A)
    p_A = softmax([parameters["mixlora_route_A"][e] @ condition for e in range(E)])
    chosen_A = top(p_A, r)
    scores_B = p_A
    if pairing != "tied":
        scores_B = softmax([parameters["mixlora_route_B"][e] @ condition for e in range(E)])
    if pairing == "released":  # a row of sums times a row of sums, and one softmax more
        summed = [torch.zeros(()) for _ in range(E)]
        for i, e in enumerate(chosen_A):
            q = softmax([A[e].sum() * parameters["mixlora_route_AB"][i][:, f].sum() for f in range(E)])
            summed = [total + extra for total, extra in zip(summed, q, strict=True)]
        scores_B = [s + extra for s, extra in zip(scores_B, softmax(summed), strict=True)]
    if pairing == "conditional":
        for i, e in enumerate(chosen_A):
            q = softmax([A[e] @ parameters["mixlora_route_AB"][i][:, f] for f in range(E)])
            scores_B = [s + extra for s, extra in zip(scores_B, q, strict=True)]

    if kind == "dense":
        order_A = order_B = list(range(E))
        scale = alpha / E  # R becomes E
    else:
        order_A = chosen_A
        order_B = chosen_A if pairing == "tied" else top(scores_B, r)
        scale = alpha / r
    gates_A = gate(p_A, order_A, "weighted" if kind == "dense" else kind)
    gates_B = gate(scores_B, order_B, "weighted" if kind == "dense" else kind)
    rows = []
    for x in x_SI:
        y = torch.zeros(B.shape[1])
        for slot, (a, b) in enumerate(zip(order_A, order_B, strict=True)):
            weight = gates_A[slot] if pairing == "tied" else gates_A[slot] * gates_B[slot]
            y = y + scale * weight * (x @ A[a]) * B[b]
        rows.append(y)
    return torch.stack(rows)
