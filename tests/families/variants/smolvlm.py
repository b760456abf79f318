"""SmolVLM 2: Idefics3's tiles; its processor does not say how many tokens an image takes."""

from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

from tests.families.variant import Made, Variant
from tests.unit.backbone.image_tokens.families import TILES, picked

from . import idefics3


def make(tokens) -> Made:
    videos = SmolVLMVideoProcessor(**TILES)
    images = picked(SmolVLMImageProcessor)(**TILES)
    return idefics3.config(tokens, "smolvlm"), SmolVLMProcessor(images, tokens, videos, image_seq_len=4)


VARIANT = Variant(
    make, idefics3.VARIANT.template, idefics3.VARIANT.named, idefics3.VARIANT.marks, bos=idefics3.VARIANT.bos
)
