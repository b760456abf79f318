"""Ministral 3: Mistral 3's frame around a decoder of its own."""

from functools import partial

from tests.families.variant import ROPE as PLAIN
from tests.families.variant import Variant

from . import mistral3

ROPE = {**PLAIN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}
VARIANT = Variant(
    partial(mistral3.make, kind="ministral3", rope_parameters=ROPE), mistral3.VARIANT.template, mistral3.VARIANT.named,
    mistral3.VARIANT.marks, bos="<s>", eos="</s>",
)  # fmt: skip
