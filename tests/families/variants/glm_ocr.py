"""GLM-OCR: GLM-4.1V's frame, small, for documents."""

from transformers import Glm46VImageProcessor, Glm46VProcessor, Glm46VVideoProcessor

from tests.families.variant import Made, Variant, text

from . import glm4v


def make(tokens) -> Made:
    config = glm4v.config(tokens, "glm_ocr", text(rope_parameters=glm4v.ROPE_OF_3))
    images = Glm46VImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    return config, Glm46VProcessor(images, tokens, Glm46VVideoProcessor())


VARIANT = Variant(make, glm4v.VARIANT.template, glm4v.VARIANT.named, glm4v.VARIANT.marks, eos=glm4v.VARIANT.eos)
