"""Backbones of tests: random and small, as ordinary checkpoint folders with a real processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from qmixlora.demo.backbone import make_config


def save_llava(folder: Path, processor: Any, *, layers: int, width: int, tied: bool = False) -> Path:
    """A random LLaVA in a folder; `tied`: lm_head and the input embeddings are one tensor."""
    torch.manual_seed(0)
    config = make_config(processor.tokenizer, layers=layers, width=width)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
