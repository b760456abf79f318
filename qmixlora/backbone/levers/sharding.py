"""Decoder layers whose frozen weights lie in shares, one in each process, and are whole while they compute (FSDP2)."""

from __future__ import annotations

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..nf4 import quant_state_of


def shard_layers(model: nn.Module, paths: list[str], device: torch.device) -> None:
    """Cut the frozen weights of these layers into shares, each layer when it is on the device; then put the rest there.

    What is trained stays whole, and so do the scales of 4-bit weights (3 % of the bytes). Those weights have to be
    stored in a floating dtype (`bnb_4bit_quant_storage`): FSDP2 has no gradient-less integers.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for path in paths:
        layer = model.get_submodule(path)
        for module in layer.modules():
            if isinstance(module, Linear4bit):
                module.quant_state = quant_state_of(module)  # where bitsandbytes looks beside a weight's own
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
