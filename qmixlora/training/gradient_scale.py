"""Gradients of float16 on their way through a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class GradientScale:
    """Keeps gradients in the range of float16 on their way through the backbone.

    The loss is a mean over the step's supervised tokens, and float16 flushes most of its gradients to zero. On the way
    back they are those of the sum instead (at most 1 for a logit), and are divided by the number of tokens where they
    arrive at a trained parameter, in fp32: by hooks, from the first loss until `let_go` takes them off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.scale: Tensor | int = 1
        self.hooks: list[RemovableHandle] = []

    def __call__(self, loss: Tensor, scale: Tensor | int) -> Tensor:
        """The loss, with gradients `scale` times as large until they arrive."""
        self.scale = scale
        if not self.hooks:
            trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
            self.hooks = [parameter.register_hook(lambda gradient: gradient / self.scale) for parameter in trained]
        scaled: Tensor = _ScaledBackward.apply(loss, scale)
        return scaled

    def let_go(self) -> None:
        """Leave the parameters to whoever trains them next, whose gradients would be divided once more."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


class _ScaledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor | int) -> Tensor:
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None
