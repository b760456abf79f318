"""Inspection: samples as they are learned from, and the interference of tasks."""

from .interference import Interference, measure_interference
from .samples import DecodedSample, decode_samples

__all__ = ["DecodedSample", "Interference", "decode_samples", "measure_interference"]
