"""The frozen backbone: its anatomy, loading in NF4, checks; memory levers; images by family."""

from .anatomy import Anatomy, find_anatomy
from .checks import check_quantized, keep_cpu_weights_unpacked
from .kinds import read_config
from .learned_on import base_record, how_to_bring_back, others_in, reader_record, tell_other_base
from .loading import load_backbone, load_processor, open_processor, source_of
from .nf4 import nf4_linear, quant_state_of
from .skeleton import Parts, Shares, make_skeleton, parts_of, shares_of
from .weights import weight_files

__all__ = [
    "Anatomy",
    "Parts",
    "Shares",
    "base_record",
    "check_quantized",
    "find_anatomy",
    "how_to_bring_back",
    "keep_cpu_weights_unpacked",
    "load_backbone",
    "load_processor",
    "make_skeleton",
    "nf4_linear",
    "open_processor",
    "others_in",
    "parts_of",
    "quant_state_of",
    "read_config",
    "reader_record",
    "shares_of",
    "source_of",
    "tell_other_base",
    "weight_files",
]
