"""What a run learned on, as its recipe records it: the weights of its base, and what that makes of texts and images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.reader import IMAGES, TEMPLATE, TOKENIZER, read_by
from qmixlora.recipe import Model

from .loading import open_processor
from .weights import COMMIT, WEIGHTS, recorded

COMPARED = {WEIGHTS: "weights", TEMPLATE: "chat template", TOKENIZER: "tokenizer", IMAGES: "image processor"}


def base_record(spec: Model, config: PretrainedConfig, processor: ProcessorMixin) -> dict[str, str]:
    """What tells a model that was loaded, with its `config` and `processor`, from another. A recipe's limit of image
    tokens, which is compared by itself, is not to be in the processor yet.
    """
    return {**recorded(spec, config), **read_by(processor)}


def reader_record(spec: Model) -> dict[str, str]:
    """The same without its weights, of a model that is not loaded. Raises UserError as `open_processor`."""
    return read_by(open_processor(spec, None))


def others_in(own: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of a model is another than in a record, in words, as far as both are known; empty where nothing is."""
    known = own.keys() & now.keys()
    return " and ".join(name for key, name in COMPARED.items() if key in known and own[key] != now[key])


def how_to_bring_back(own: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How what is in a record is had again, where others are there now."""
    if COMMIT in own and own[COMMIT] != now.get(COMMIT):
        return f"set model.revision: {own[COMMIT]}"
    return "bring back what there was"


def tell_other_base(spec: Model, now: Mapping[str, str], folder: Path) -> None:
    """Say on stderr what of a model is another than the adapter in a folder was trained on, if anything is."""
    if others := others_in(spec.learned_on, now):
        print(
            f"{folder}: of {spec.id}, this is not what the adapter was trained on: {others}. Its answers, and what is"
            f" made of it, are of another model. If that is not meant, {how_to_bring_back(spec.learned_on, now)}.",
            file=sys.stderr,
        )
