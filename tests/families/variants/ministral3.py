"""Ministral 3: Mistral 3's frame around a decoder of its own."""

from functools import partial

from tests.families.variant import Variant

from . import mistral3

VARIANT = Variant(
    partial(mistral3.make, kind="ministral3"), mistral3.VARIANT.template, mistral3.VARIANT.named,
    mistral3.VARIANT.marks, bos="<s>", eos="</s>",
)  # fmt: skip
