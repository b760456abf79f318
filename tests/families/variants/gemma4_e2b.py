"""Gemma 4, small: every layer has inputs of its own."""

from functools import partial

from tests.families.variant import Variant

from . import gemma4

VARIANT = Variant(
    partial(gemma4.make, hidden_size_per_layer_input=64), gemma4.VARIANT.template, gemma4.VARIANT.named,
    gemma4.VARIANT.marks,
)  # fmt: skip
