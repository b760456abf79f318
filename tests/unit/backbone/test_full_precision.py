"""A module that is trained whole computes in fp32 inside a 16-bit model, whatever its inputs are nested in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qmixlora.backbone.full_precision import train_in_fp32


class Connector(nn.Module):
    """As projectors are that map the features of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, last: Tensor, earlier: list[Tensor], *, ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        return self.linear(last), [self.linear(one) for one in earlier], ids


def test_nested_inputs_are_raised_and_nested_outputs_lowered() -> None:
    module = Connector().to(torch.bfloat16)
    train_in_fp32(module)
    last = torch.ones(2, 4, dtype=torch.bfloat16)
    output, earlier, ids = module(last, [last], ids=torch.tensor([1]))
    assert module.linear.weight.dtype == torch.float32
    assert {output.dtype, earlier[0].dtype} == {torch.bfloat16} and ids.dtype == torch.int64
