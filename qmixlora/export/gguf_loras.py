"""`--as gguf`: the static adapter of every target as a LoRA file for llama.cpp, with the numbers of its LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from qmixlora.backbone import source_of
from qmixlora.errors import UserError
from qmixlora.files import replacing
from qmixlora.recipe import Recipe

from .adapters import Adapter
from .fidelity import Fidelity
from .job import Job
from .llama_cpp import LlamaModel, note_on_images
from .static import read
from .targets import Request

CARD = """# {task}: a LoRA for llama.cpp

Rank {rank}, for the text part of `{base}`: on another base it does something else. With llama.cpp's converter and
server:

```bash
python convert_hf_to_gguf.py {base} --outfile base.gguf
llama-server -m base.gguf --lora {file}
qmixlora check {folder} --llama-server http://127.0.0.1:8080
```

{images}
"""


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
        fidelity = replace(lora, folder=final, measurements=measured, notes=(images,))
        job.say_what_is_replaced(final, fidelity)
        with replacing(final) as temporary:
            temporary.mkdir()
            task, file = "+".join(target.shares), f"{target.name}.gguf"
            model.write_lora(temporary / file, read(adapter.folder).updates, task, f"LoRA for {target.name}")
            base = job.carry_base(temporary)
            card = CARD.format(task=task, rank=lora.rank, base=base, file=final / file, folder=final, images=images)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            job.finish(temporary, fidelity)
        made.append(fidelity)
    return made
