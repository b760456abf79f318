"""The settings of a run that an export carries, where stock libraries and servers look for them: where generation stops
and how it decodes, how large an image may be, and the arguments of the chat template.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from qmixlora.backbone import source_of
from qmixlora.backbone.image_tokens import limit_image_tokens
from qmixlora.data import Collator
from qmixlora.evaluation import stop_ids
from qmixlora.files import write_json
from qmixlora.recipe import Model, Recipe
from qmixlora.session import Session

GENERATION, CONFIG, TEMPLATE = "generation_config.json", "config.json", "chat_template.jinja"
PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
CARRIED = "Answers end in a token that the base's own generation does not stop at: give `generate` the eos_token_id of"
CARRIED += f" the export's {GENERATION}."


def carry_stops(folder: Path, session: Session) -> bool:
    """Write into the generation config in `folder` that generation stops where it did in the run, if the checkpoint
    does not know it; returns whether it was necessary.
    """
    known, stops = _as_list(session.backbone.generation_config.eos_token_id), stop_ids(session)
    if set(known) >= set(stops):
        return False
    path = folder / GENERATION
    write_json(path, {**_read(path), "eos_token_id": stops})
    return True


def carry_settings(folder: Path, recipe: Recipe, collator: Collator) -> None:
    """Write a run's settings into the files of a checkpoint, so that stock libraries make the same tokens of the same
    images and words, and answer as the run does in evaluation.
    """
    _carry_decoding(folder, recipe, collator)
    if recipe.data.max_image_tokens is not None:
        _carry_image_limit(folder, recipe.model, recipe.data.max_image_tokens)
    if recipe.model.template_arguments:
        _carry_template_arguments(folder, recipe.model, str(collator.processor.chat_template))


def _carry_decoding(folder: Path, recipe: Recipe, collator: Collator) -> None:
    """Greedy, to the run's longest answer: of the likeliest token alone, which servers (vLLM, SGLang) understand too.

    They read no `do_sample`; and transformers warns of `top_k` without it, and then saves no model that has changed.
    `top_k` keeps all of several tokens that are equally likely (bfloat16 has such), of which `top_p` leaves one.
    """
    path = folder / GENERATION
    before = {**_of_config(folder), **_read(path)}
    stops = sorted({*_as_list(before.get("eos_token_id")), *collator.stop_ids})
    greedy = {"do_sample": True, "top_k": 1, "top_p": 0.01, "max_new_tokens": recipe.train.max_new_tokens}
    kept = {name: before[name] for name in KEPT if before.get(name) is not None}
    padding = {} if collator.pad_token_id is None else {"pad_token_id": collator.pad_token_id}
    write_json(path, {**padding, **kept, "eos_token_id": stops[0] if len(stops) == 1 else stops, **greedy})


def _carry_image_limit(folder: Path, spec: Model, max_image_tokens: int) -> None:
    """Hold the processor's files, and those of the config's values that must agree, to a number of image tokens."""
    code = {"trust_remote_code": source_of(spec)["trust_remote_code"]}
    config, processor = AutoConfig.from_pretrained(folder, **code), AutoProcessor.from_pretrained(folder, **code)
    before = config.to_dict()
    limit_image_tokens(processor, config, max_image_tokens)
    if changed := {name: value for name, value in config.to_dict().items() if value != before.get(name)}:
        write_json(folder / CONFIG, {**_read(folder / CONFIG), **changed})
    if (folder / IMAGE_PROCESSOR).is_file():
        processor.image_processor.save_pretrained(folder)
    if (folder / PROCESSOR).is_file():
        with tempfile.TemporaryDirectory() as scratch:  # the tokenizer's files stay as they are
            processor.save_pretrained(scratch)
            write_json(folder / PROCESSOR, _read(Path(scratch) / PROCESSOR))


def _carry_template_arguments(folder: Path, spec: Model, template: str) -> None:
    """Make the recipe's arguments of the chat template its defaults."""
    defaults = (
        f"{{%- set {name} = {name} if {name} is defined else {value!r} -%}}"
        for name, value in spec.template_arguments.items()
    )
    (folder / TEMPLATE).write_text("".join(defaults) + template, encoding="utf-8")


def _of_config(folder: Path) -> dict[str, Any]:
    """The tokens that a model's config names, for checkpoints without a generation config."""
    config = _read(folder / CONFIG)
    return {**config.get("text_config", {}), **config}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _as_list(token: Any) -> list[int]:
    return [] if token is None else [token] if isinstance(token, int) else list(token)
