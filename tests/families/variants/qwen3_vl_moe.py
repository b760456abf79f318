"""Qwen3-VL with experts, which are 3-D parameters."""

from functools import partial

from tests.families.variant import ROPE, Variant, text

from . import qwen3_vl

DECODER = text(
    rope_parameters={**ROPE, "mrope_section": [8, 4, 4]}, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=64,
)  # fmt: skip
VARIANT = Variant(
    partial(qwen3_vl.make, kind="qwen3_vl_moe", decoder=DECODER), qwen3_vl.VARIANT.template, qwen3_vl.VARIANT.named,
    qwen3_vl.VARIANT.marks, eos=qwen3_vl.VARIANT.eos,
)  # fmt: skip
