"""InstructBLIP: a Q-Former reads the image, and the instruction with it."""

from transformers import BlipImageProcessor, InstructBlipProcessor

from tests.families.variant import Made, Variant

from . import blip_2


def make(tokens) -> Made:
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    return blip_2.config(tokens, "instructblip"), InstructBlipProcessor(images, tokens, tokens, num_query_tokens=4)


VARIANT = Variant(
    make,
    blip_2.VARIANT.template,
    named=blip_2.VARIANT.named,
    bos="<s>",
    eos="</s>",
    refused={"load": "reads no chat template"},
)
