"""The models that are timed: LLaVAs of some sizes with random weights, and a batch for them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from qmixlora.demo.backbone import make_config, processor_of
from qmixlora.files import replacing


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    batch: int
    tokens: int


SIZES = {
    "tiny": Size(width=128, layers=4, batch=32, tokens=22),  # the embedded backbone in training
    "small": Size(width=1024, layers=2, batch=2, tokens=256),
    "7b": Size(width=4096, layers=4, batch=2, tokens=1024),  # LLaVA-1.5-7B shapes, four of its 32 layers; needs a GPU
}


def with_ordinary_heads(text: LlamaConfig) -> None:
    """Give a decoder heads of the width that models have (128), for which fused attention is made."""
    text.num_attention_heads = text.num_key_value_heads = max(4, text.hidden_size // 128)
    text.head_dim = text.hidden_size // text.num_attention_heads


def config_of(size: Size, tokenizer: Any) -> LlavaConfig:
    """A LLaVA of a size; of the width of LLaVA-1.5-7B, its decoder's layers and vocabulary too."""
    config = make_config(tokenizer, layers=size.layers, width=size.width)
    with_ordinary_heads(config.text_config)
    config.text_config.max_position_embeddings = 4096
    if size.width == SIZES["7b"].width:
        config.text_config.intermediate_size, config.text_config.vocab_size = 11008, 32064
    return config


def backbone_folder(size: Size) -> Path:
    folder = Path(tempfile.gettempdir()) / f"qmixlora-speed-v2-{size.width}x{size.layers}"
    if not (folder / "config.json").is_file():
        processor = processor_of(f"word{index}" for index in range(400))
        torch.manual_seed(0)
        with replacing(folder) as temporary:
            LlavaForConditionalGeneration(config_of(size, processor.tokenizer)).to(torch.bfloat16).save_pretrained(
                temporary
            )
            processor.save_pretrained(temporary)
    return folder


def batch_of(size: Size, model: nn.Module) -> dict[str, Any]:
    """One image, a text of the wanted length, three supervised tokens."""
    config = model.config
    image_tokens = config.image_seq_length
    ids = torch.randint(5, config.text_config.vocab_size, (size.batch, size.tokens))
    ids[:, 1 : 1 + image_tokens] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    pixels = torch.randn(size.batch, 3, config.vision_config.image_size, config.vision_config.image_size)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    device, dtype = model.device, model.dtype
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}
