"""Ministral 3: Mistral 3's frame around a decoder of its own."""

from functools import partial

from tests.families.variant import ROPE as PLAIN
from tests.families.variant import Variant

from . import mistral3

ROPE = {  # positions scale queries beyond a length
    **PLAIN, "type": "yarn", "rope_type": "yarn", "factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096,
}  # fmt: skip
VARIANT = Variant(
    partial(mistral3.make, kind="ministral3", rope_parameters=ROPE), mistral3.VARIANT.template, mistral3.VARIANT.named,
    mistral3.VARIANT.marks, bos="<s>", eos="</s>",
)  # fmt: skip
