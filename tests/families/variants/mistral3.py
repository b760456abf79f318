"""Mistral Small 3.2 and Ministral 3: Pixtral's tower, images of any shape with a mark for every row's end."""

from transformers import PixtralImageProcessor, PixtralProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision

TOWER = vision("pixtral", size=112, patch=7, head_dim=32)


def processor(tokens, merge: int) -> PixtralProcessor:
    images = PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 7, "width": 7})
    return PixtralProcessor(
        images,
        tokens,
        patch_size=7,
        spatial_merge_size=merge,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )


def make(tokens, kind: str = "mistral", **decoder) -> Made:
    config = config_of(
        "mistral3", tokens, text_config=text(kind, **decoder), vision_config=TOWER,
        image_token_index=tokens.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    return config, processor(tokens, 2)


VARIANT = Variant(
    make, template("[IMG]", "[INST]", "", "</s>", turn_end="[/INST]", bos="<s>"),
    named={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    marks=("[INST]", "[/INST]"), bos="<s>", eos="</s>",
)  # fmt: skip
