"""Qwen3.5 with experts, which are 3-D parameters."""

from functools import partial

from tests.families.variant import Variant

from . import qwen3_5, qwen3_vl

DECODER = {
    **qwen3_5.DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
VARIANT = Variant(
    partial(qwen3_vl.make, kind="qwen3_5_moe", decoder=DECODER, deepstack=()), qwen3_vl.VARIANT.template,
    qwen3_vl.VARIANT.named, qwen3_vl.VARIANT.marks, eos=qwen3_vl.VARIANT.eos,
)  # fmt: skip
