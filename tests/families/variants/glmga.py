"""GLM's image processor for pictures of any shape, around GLM-4.6V's model."""

from transformers import Glm46VProcessor, Glm46VVideoProcessor, GlmgaImageProcessor

from tests.families.variant import Made, Variant, text

from . import glm4v


def make(tokens) -> Made:
    config = glm4v.config(tokens, "glmga", text("glm4v_text", rope_parameters=glm4v.ROPE_OF_3))
    images = GlmgaImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    return config, Glm46VProcessor(images, tokens, Glm46VVideoProcessor())


VARIANT = Variant(make, glm4v.VARIANT.template, glm4v.VARIANT.named, glm4v.VARIANT.marks, eos=glm4v.VARIANT.eos)
