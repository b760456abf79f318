"""Qwen3.5: three layers in four with linear attention; its template thinks."""

from functools import partial

from tests.families.variant import ROPE, Variant, text

from . import qwen3_vl

DECODER = text(
    rope_parameters={**ROPE, "mrope_section": [8, 4, 4], "partial_rotary_factor": 1.0},
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=32, linear_value_head_dim=32,
)  # fmt: skip
VARIANT = Variant(
    partial(qwen3_vl.make, kind="qwen3_5", decoder=DECODER, deepstack=()), qwen3_vl.VARIANT.template,
    qwen3_vl.VARIANT.named, qwen3_vl.VARIANT.marks, eos=qwen3_vl.VARIANT.eos,
)  # fmt: skip
