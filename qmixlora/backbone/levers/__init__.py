"""Memory levers: changes of a model or a run, so that it takes less of the card."""

from .apply import apply_levers, has_levers, has_quantized_parts, host_bytes, host_tensors, without_levers
from .checkpointing import enable_checkpointing
from .checks import check_levers
from .chunked_mlp import chunk_mlps
from .host_embedding import HostEmbedding
from .sharding import shard_layers
from .vision import in_place_of_images, take_out_vision, use_features

__all__ = [
    "HostEmbedding",
    "apply_levers",
    "check_levers",
    "chunk_mlps",
    "enable_checkpointing",
    "has_levers",
    "has_quantized_parts",
    "host_bytes",
    "host_tensors",
    "in_place_of_images",
    "shard_layers",
    "take_out_vision",
    "use_features",
    "without_levers",
]
