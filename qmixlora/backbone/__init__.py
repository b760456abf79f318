"""The frozen backbone: its anatomy, loading in NF4, where its weights lie, checks."""

from .anatomy import Anatomy, find_anatomy
from .checks import check_quantized, keep_cpu_weights_unpacked
from .loading import load_backbone
from .nf4 import nf4_linear
from .peak import LoadingPeak, loading_peak
from .placement import arrange, has_levers, host_tensors, without_levers

__all__ = [
    "Anatomy",
    "LoadingPeak",
    "arrange",
    "check_quantized",
    "find_anatomy",
    "has_levers",
    "host_tensors",
    "keep_cpu_weights_unpacked",
    "load_backbone",
    "loading_peak",
    "nf4_linear",
    "without_levers",
]
