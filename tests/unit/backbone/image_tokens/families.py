"""Tiny models of every family, and their real processors as transformers picks them where torchvision is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.auto.image_processing_auto import DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS

PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
MARKS = ["<fake_token_around_image>", "<global-img>", *PLACES, "<start>", "<end>", "\n", "\n\n", "word"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TILES = {"size": {"longest_edge": 4 * 28}, "max_image_size": {"longest_edge": 28}}
QWEN: dict[str, tuple[Any, type, int, dict[str, Any]]] = {  # processor, its videos' part, patch, vision's config
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor, 14, {"embed_dim": 32, "hidden_size": 32}),
    "qwen2_5_vl": (
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        14,
        {"hidden_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        16,
        {"hidden_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    ),
}
MakeTokenizer = Callable[[dict[str, str]], PreTrainedTokenizerFast]
IMAGE = 60  # the id of image tokens in every tiny model


def tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Every mark is one token; `special` are named as the family's processor asks for them, the image token first."""
    words = ["<pad>", "<bos>", *MARKS, "<eos>"]
    words += [f"<unused_{index}>" for index in range(len(words), IMAGE)] + list(special.values())
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens=special
    )
    fast.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)
    return fast


def text_config(kind: str = "", **more: Any) -> dict[str, Any]:
    named = {"model_type": kind} if kind else {}
    return {
        **named, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 70, "head_dim": 16, "rope_parameters": ROPE, "pad_token_id": 0, **more,
    }  # fmt: skip


def vision_config(kind: str, size: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": size, "patch_size": patch, **more,
    }  # fmt: skip


def llava(make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING["llava"](
        text_config=text_config("llama"), vision_config=vision_config("clip_vision_model", 28, 7),
        image_token_index=IMAGE,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, make({"image_token": "<image>"}), patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return config, processor


def llava_onevision(make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    """Tiles of 28 pixels and 4 x 4 features, up to 4 x 4 tiles; what is over 5 tiles is scaled down."""
    pinpoints = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = CONFIG_MAPPING["llava_onevision"](
        text_config=text_config("qwen2"), image_token_index=IMAGE, video_token_index=IMAGE + 1,
        vision_config=vision_config("siglip_vision_model", 28, 7, vision_use_head=False),
        image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_5",
    )  # fmt: skip
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints),
        make({"image_token": "<image>", "video_token": "<video>"}), LlavaOnevisionVideoProcessor(),
        num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_5",
    )  # fmt: skip
    return config, processor


def qwen(kind: str, make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    processor, videos, patch, vision = QWEN[kind]
    config = CONFIG_MAPPING[kind](
        text_config=text_config(rope_parameters={**ROPE, "mrope_section": [4, 2, 2]}),
        vision_config={"depth": 2, "intermediate_size": 64, "num_heads": 2, "patch_size": patch, **vision},
        image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=2, vision_end_token_id=3,
    )  # fmt: skip
    names = make({"image_token": "<image>", "video_token": "<video>"})
    images = Qwen2VLImageProcessor(patch_size=patch)
    return config, processor(images, names, videos(patch_size=patch))


def gemma3(make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING["gemma3"](
        text_config=text_config(rope_parameters=None),
        vision_config=vision_config("siglip_vision_model", 28, 7, vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
    )  # fmt: skip
    names = make({"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "</image>"})
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return config, Gemma3Processor(images, names, image_seq_length=4)


def internvl(make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    config = CONFIG_MAPPING["internvl"](
        text_config=text_config("qwen2"), vision_config=vision_config("internvl_vision", 28, 7),
        image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    names = {
        "context_image_token": "<image>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>",
    }  # fmt: skip
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28})
    return config, InternVLProcessor(images, make(names), InternVLVideoProcessor(), image_seq_length=4)


def idefics3(make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    config, tokens = idefics3_config("idefics3"), make({"image_token": "<image>"})
    return config, Idefics3Processor(picked(Idefics3ImageProcessor)(**TILES), tokens, image_seq_len=4)


def smolvlm(make: MakeTokenizer = tokenizer) -> tuple[PretrainedConfig, Any]:
    config, tokens = idefics3_config("smolvlm"), make({"image_token": "<image>"})
    videos = SmolVLMVideoProcessor(**TILES)
    return config, SmolVLMProcessor(picked(SmolVLMImageProcessor)(**TILES), tokens, videos, image_seq_len=4)


def picked(images: type[Any]) -> type[Any]:
    """The class that AutoProcessor picks: the one of PIL, where torchvision (before 0.27) has no Lanczos filter."""
    if images.__name__ in DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS:
        return getattr(transformers, f"{images.__name__}Pil")
    return images


def idefics3_config(kind: str) -> PretrainedConfig:
    return CONFIG_MAPPING[kind](
        text_config=text_config("llama"), vision_config=vision_config(f"{kind}_vision", 28, 7),
        image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip


MAKERS: dict[str, Callable[..., tuple[PretrainedConfig, Any]]] = {
    "llava": llava,
    "llava_onevision": llava_onevision,
    "qwen2_vl": partial(qwen, "qwen2_vl"),
    "qwen2_5_vl": partial(qwen, "qwen2_5_vl"),
    "qwen3_vl": partial(qwen, "qwen3_vl"),
    "gemma3": gemma3,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}


# features that came for all images together, before there was this argument
TOGETHER: set[str] = set()
if "mm_encoder_outputs" not in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters:
    TOGETHER = {"qwen3_vl"}


def draw(height: int, width: int) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def marked(processor: Any) -> str:
    """The text that stands for an image, with the marks that chat templates of the family write around it."""
    return "<start> <image> <end>" if "Qwen" in type(processor).__name__ else "<image>"


def process(processor: Any, shape: tuple[int, int], rows: int = 2) -> dict[str, Any]:
    """Samples with an image of this height and width and three words, as the real processor makes them."""
    images = [[draw(*shape)] for _ in range(rows)]
    return dict(
        processor(text=[f"word {marked(processor)} word word"] * rows, images=images, return_tensors="pt", padding=True)
    )


def image_tokens(inputs: dict[str, Any]) -> int:
    """Image tokens of the first sample."""
    return int((inputs["input_ids"][0] == IMAGE).sum())
