"""Qwen4's experiment: Qwen3.5's layers with experts and several streams of hidden states."""

from functools import partial

from tests.families.variant import ROPE, Variant, text

from . import qwen3_vl

DECODER = text(
    rope_parameters={**ROPE, "mrope_section": [8, 4, 4], "partial_rotary_factor": 1.0},
    layer_types=["linear_attention", "indexed_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=32, linear_value_head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, hc_lowrank=64, hc_count=2, indexer_n_heads=2, indexer_kv_heads=1,
    indexer_head_dim=32, indexer_budget=64, indexer_compress_ratio=4,
)  # fmt: skip
VARIANT = Variant(
    partial(qwen3_vl.make, kind="qwen4_exp", decoder=DECODER, deepstack=()), qwen3_vl.VARIANT.template,
    qwen3_vl.VARIANT.named, qwen3_vl.VARIANT.marks, eos=qwen3_vl.VARIANT.eos,
)  # fmt: skip
