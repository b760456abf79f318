"""Cosmos 3 Omni: Qwen3-VL's parts under a frame of its own."""

from functools import partial

from tests.families.variant import ROPE, Variant, text

from . import qwen3_vl

DECODER = text("qwen3_vl_text", rope_parameters={**ROPE, "mrope_section": [8, 4, 4]})
VARIANT = Variant(
    partial(qwen3_vl.make, kind="cosmos3_omni", decoder=DECODER), qwen3_vl.VARIANT.template, qwen3_vl.VARIANT.named,
    qwen3_vl.VARIANT.marks, eos=qwen3_vl.VARIANT.eos,
)  # fmt: skip
