"""GLM-4.5V: experts, which are 3-D parameters; PEFT rewrites the names of its other feed-forward layers."""

from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

from tests.families.variant import Made, Variant, text

from . import glm4v


def make(tokens) -> Made:
    decoder = text(
        rope_parameters=glm4v.ROPE_OF_3, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    processor = Glm4vProcessor(Glm4vImageProcessor(size=size), tokens, Glm4vVideoProcessor())
    return glm4v.config(tokens, "glm4v_moe", decoder), processor


VARIANT = Variant(
    make, glm4v.VARIANT.template, glm4v.VARIANT.named, glm4v.VARIANT.marks, eos=glm4v.VARIANT.eos,
)  # fmt: skip
