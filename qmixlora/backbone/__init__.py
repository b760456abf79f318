"""The frozen backbone: its anatomy, loading in NF4, where its weights lie, checks."""

from .anatomy import Anatomy, find_anatomy
from .checks import check_quantized, keep_cpu_weights_unpacked
from .levers.apply import arrange, has_levers, host_tensors, without_levers
from .loading import load_backbone
from .nf4 import nf4_linear

__all__ = [
    "Anatomy",
    "arrange",
    "check_quantized",
    "find_anatomy",
    "has_levers",
    "host_tensors",
    "keep_cpu_weights_unpacked",
    "load_backbone",
    "nf4_linear",
    "without_levers",
]
