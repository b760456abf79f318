"""The frozen backbone: its anatomy, loading in NF4, checks."""

from .anatomy import Anatomy, find_anatomy
from .loading import check_quantized, keep_cpu_weights_unpacked, load_backbone

__all__ = ["Anatomy", "check_quantized", "find_anatomy", "keep_cpu_weights_unpacked", "load_backbone"]
