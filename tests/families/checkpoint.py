"""A variant's checkpoint folder, and samples with images of several shapes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from tests.unit.backbone.image_tokens.families import draw

from .variant import Variant

SHAPES = ((40, 40), (30, 60), (112, 112), (60, 20))  # height, width
WORDS = ("what is this", "which colour has it, and why", "say it", "is this a b")


def make_checkpoint(variant: Variant, folder: Path) -> Path:
    """Save a random model with its processor in an empty folder."""
    config, processor = variant.build()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _spread(model)
    eos = processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=processor.tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Weights large enough that an image shows in the logits; nothing that starts at zero (it would hide faults)."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.12)
        elif not parameter.any():
            parameter.normal_(0, 0.02 if parameter.dim() else 0.5)


def make_data(folder: Path) -> Path:
    """Four samples of two tasks with images of several shapes, the second one the longest by its text."""
    samples = []
    for index, (shape, words) in enumerate(zip(SHAPES, WORDS, strict=True)):
        draw(*shape).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>{words}"}, {"from": "gpt", "value": ("no", "yes")[index % 2]}]
        samples.append({"image": f"{index}.png", "conversations": turns, "task": ("a", "b")[index // 2]})
    path = folder / "data.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path
