"""`--as gguf`: the static adapter of every target as a LoRA file for llama.cpp, with the numbers of its LoRA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qmixlora.backbone import source_of
from qmixlora.errors import UserError, typed
from qmixlora.files import replacing, write_json
from qmixlora.recipe import Recipe
from qmixlora.serving.files.exports import image_limits
from qmixlora.serving.files.places import options_of_images, options_of_stops

from .adapters import Adapter
from .fidelity import Fidelity
from .job import Job
from .llama_cpp import LlamaModel, note_on_images
from .settings import GENERATION, PROCESSOR
from .static import read
from .targets import Request

CARD = """# {task}: a LoRA for llama.cpp

Rank {rank}, for the text part of `{base}`: on another base it does something else. With llama.cpp's converter and
server:

```bash
python convert_hf_to_gguf.py {checkpoint} --outfile base.gguf
{serve}
{check}
```

{notes}
"""
STOPS = (
    "Answers end in {token!r}, which llama.cpp may not know to end one: start llama-server with {options}, as "
    "`qmixlora serve-files` does."
)
LIMITED = (
    "The run held images to data.max_image_tokens={limit}, which llama.cpp's converter leaves out: start llama-server "
    "with {options}, as `qmixlora serve-files` does."
)


def check(recipe: Recipe, request: Request) -> None:
    """Refuse what llama.cpp has no file for.

    Raises:
        UserError: as `LlamaModel.of` and `check_projector`.
    """
    LlamaModel.of(config_of(recipe))
    check_projector(recipe, request)


def check_projector(recipe: Recipe, request: Request) -> None:
    """Raise UserError if a trained projector would be in the adapters."""
    if recipe.adapter.projector != "frozen" and request.projector != "base":
        raise UserError(
            "A LoRA of llama.cpp is one of the language model alone, and this run's projector would be in the adapter.",
            where="--as gguf",
            fix="Leave --projector out: it is in the base then.",
        )


def config_of(recipe: Recipe) -> Any:
    """The config of a recipe's model."""
    return AutoConfig.from_pretrained(recipe.model.id, **source_of(recipe.model))


def write(job: Job, adapters: Sequence[Adapter]) -> list[Fidelity]:
    """Write `TASK-gguf/TASK.gguf` of every adapter."""
    config, made = config_of(job.recipe), []
    model, images = LlamaModel.of(config), note_on_images(config)
    for adapter in adapters:
        target, lora = adapter.live.target, adapter.fidelity
        final = job.folder_of(target, "gguf")
        measured = {**lora.measurements, "gguf": lora.measurements["lora"]}  # the same tensors
        fidelity = replace(lora, folder=final, measurements=measured)
        job.say_what_is_replaced(final, fidelity)
        with replacing(final) as temporary:
            temporary.mkdir()
            task, file = "+".join(target.shares), f"{target.name}.gguf"
            model.write_lora(temporary / file, read(adapter.folder).updates, task, f"LoRA for {target.name}")
            base, notes = job.carry_base(temporary), (images, *carry_stops_and_limits(job, temporary))
            of_base = {"base": base, "checkpoint": base.folder_in_shell(), "notes": "\n\n".join(notes)}
            serve = typed("-m", "base.gguf", "--lora", final / file, program="llama-server")
            check = typed("check", final, "--llama-server", "http://127.0.0.1:8080")
            card = CARD.format(task=task, rank=lora.rank, serve=serve, check=check, **of_base)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            fidelity = replace(fidelity, notes=notes)
            job.finish(temporary, fidelity)
        made.append(fidelity)
    return made


def carry_stops_and_limits(job: Job, folder: Path) -> list[str]:
    """Write where answers end and how large images may be into a folder, as `serve-files` looks for them; returns what
    is to be told of it. A GGUF base has the tokenizer's own end alone, and no limits.
    """
    collator, limit, notes = job.collator, job.recipe.data.max_image_tokens, list[str]()
    if collator.end_id != collator.processor.tokenizer.eos_token_id:
        token = collator.template.end_token
        write_json(folder / GENERATION, {"eos_token_id": [collator.end_id], "stop_strings": [token]})
        notes.append(STOPS.format(token=token, options=" ".join(options_of_stops([collator.end_id]))))
    images = json.loads(collator.processor.image_processor.to_json_string())
    write_json(folder / PROCESSOR, {"image_processor": images})
    if (limits := image_limits(folder)) and limit is not None:
        notes.append(LIMITED.format(limit=limit, options=" ".join(options_of_images(limits))))
    return notes
