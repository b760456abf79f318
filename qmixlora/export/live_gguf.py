"""`--as live-gguf`: a mixture with one router, as it is: a rank-one LoRA file of every factor, and the router.

Where all layers share one selection of factors that are paired by their index, the mixture is the sum of its E rank-one
updates, each with its gate for a scale: llama-server takes such scales with every request.

Shapes: E factors in a pool, D width of the condition, V vocabulary.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qmixlora.data import held_out_split
from qmixlora.errors import CheckError, UserError
from qmixlora.files import replacing
from qmixlora.manifest import seal
from qmixlora.recipe import Recipe
from qmixlora.serving import route
from qmixlora.session import TunedSession

from .gguf_loras import carry_stops_and_limits, check_projector, config_of
from .job import FOLDER, RECIPE, Job
from .llama_cpp import LlamaModel, note_on_images
from .low_rank import LowRank
from .router import largest_difference, write_router
from .static import Learned
from .targets import Request

NAME, CLIENT = "live", "route.py"  # without a form behind it, which the folder of every task has
ROUNDING = 1e-3  # a difference of scales that fp32 sums in another order explain
CARD = """# A live mixture for llama-server

{factors} LoRA files of rank one, for the text part of `{base}`, and the router that says at which scales they work for
an instruction. With llama.cpp's converter and server, from the folder of this file:

```bash
python convert_hf_to_gguf.py {checkpoint} --outfile base.gguf
llama-server -m base.gguf --lora-scaled $(ls factor-*.gguf | sed 's/$/:0/' | paste -sd,) --no-cache-prompt
python route.py "What is in this picture?"     # the "lora" of the request; `qmixlora route` prints the same
```

The server numbers the files in their order, from 0: name no other adapter before them. With its cache of prompts it
answers from states that other scales have left. A conversation that goes on is asked with the scales of its last
question.

{notes}
"""


def check(recipe: Recipe, request: Request) -> None:
    """Refuse a run that is not the sum of rank-one updates with one gate each.

    Raises:
        UserError: layers have routers of their own; factors are not paired by index; it is routed on a task; as
            `gguf_loras.check` does.
    """
    adapter = recipe.adapter
    static = "Or export --as gguf: a LoRA file of every task."
    if adapter.method != "mixlora" or adapter.router != "model":
        has = "a plain LoRA" if adapter.method != "mixlora" else f"a router of every {adapter.router}"
        raise UserError(
            f"A live mixture on llama-server has one router for the whole model, and this run has {has}.",
            where="--as live-gguf",
            fix=f"Train with adapter.router=model adapter.num_factors=64 adapter.r=8 (docs/export.md). {static}",
        )
    if adapter.route_on == "task":
        raise UserError(
            "A run that is routed on tasks has the same update for all of a task's questions.",
            where="--as live-gguf",
            fix="Export --as gguf: a LoRA file of every task, which loses nothing.",
        )
    LlamaModel.of(config_of(recipe))
    check_projector(recipe, request)


def write(job: Job, session: TunedSession, learned: Learned) -> None:
    """Write `exports/live/`, and compare its routing with the run's.

    Raises CheckError where they differ; nothing is written then.
    """
    config, final = config_of(job.recipe), job.folder / FOLDER / NAME
    model, factors = LlamaModel.of(config), learned.identity().shape[-1]
    job.say(f"{NAME}: {factors} factors and their router")
    with replacing(final) as temporary:
        temporary.mkdir()
        for factor in range(factors):
            updates = {
                layer: LowRank(pool_EI[factor : factor + 1], pool_EO[factor : factor + 1].T)
                for layer, (pool_EI, pool_EO) in learned.pools.items()
            }
            name = f"factor-{factor:0{len(str(factors - 1))}d}"
            model.write_lora(temporary / f"{name}.gguf", updates, name, name, scaling=learned.scaling)
        write_router(session, temporary)
        shutil.copyfile(route.__file__, temporary / CLIENT)
        base, notes = job.carry_base(temporary), (note_on_images(config), *carry_stops_and_limits(job, temporary))
        of_base = {"base": base, "checkpoint": base.folder_in_shell(), "notes": "\n\n".join(notes)}
        (temporary / "README.md").write_text(CARD.format(factors=factors, **of_base), encoding="utf-8")
        shutil.copyfile(job.folder / RECIPE, temporary / RECIPE)
        seal(temporary)
        _compare(job, session, temporary)
    job.say(f"Written to {final}: README.md says how it is served. {note_on_images(config)}")


def _compare(job: Job, session: TunedSession, folder: Path) -> None:
    """Ask the written router for held-out instructions. Raises CheckError if the run itself routes otherwise."""
    difference, count = largest_difference(session, folder, job.rows(held_out_split(job.recipe.data)))
    if not difference <= ROUNDING:
        raise CheckError(
            f"The exported router gives other scales than the run: they differ by {difference:.2g}.",
            where=str(folder),
            fix="Export --as gguf; and report this, with the model's name.",
        )
    told = (
        f"{difference:.1g} from the run's own, at most, on {count} held-out instructions" if count else "not compared"
    )
    job.say(f"scales: {told}")
