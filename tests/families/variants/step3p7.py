"""Step 3.7: windows of an image beside the whole; experts."""

from transformers import Step3p7ImageProcessor, Step3p7Processor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision

MARKS = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")


def make(tokens) -> Made:
    config = config_of(
        "step3p7", tokens,
        text_config=text(
            num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
            share_expert_dim=64, mlp_layer_types=["dense", "sparse"], layer_types=["sliding_attention", "full_attention"], sliding_window=64,
        ),
        vision_config=vision(size=112, patch=14, mlp_ratio=2.0, max_position_embeddings=64),
        image_token_id=tokens.convert_tokens_to_ids("<im_patch>"),
    )  # fmt: skip
    images = Step3p7ImageProcessor(size={"height": 112, "width": 112}, patch_size=56, max_image_size=112)
    return config, Step3p7Processor(images, tokens)


VARIANT = Variant(make, chatml("<im_patch>"), marks=(*CHATML, *MARKS))
