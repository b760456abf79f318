"""GLM-4.6V-Flash: GLM-4.1V's parts under a frame of its own."""

from transformers import Glm46VImageProcessor, Glm46VProcessor, Glm46VVideoProcessor

from tests.families.variant import Made, Variant, config_of, text

from . import glm4v


def make(tokens) -> Made:
    decoder = text("glm4v_text", rope_parameters=glm4v.ROPE_OF_3)
    made = glm4v.config(tokens, "glm4v", decoder)
    config = config_of(
        "glm46v", tokens, text_config=decoder, vision_config={"model_type": "glm4v_vision", **glm4v.VISION},
        **{name: value for name, value in made.to_dict().items() if name.endswith("_token_id") and "_" in name[:6]},
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    return config, Glm46VProcessor(Glm46VImageProcessor(size=size), tokens, Glm46VVideoProcessor())


VARIANT = Variant(make, glm4v.VARIANT.template, glm4v.VARIANT.named, glm4v.VARIANT.marks, eos=glm4v.VARIANT.eos)
