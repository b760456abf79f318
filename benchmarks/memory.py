"""The planner against what is measured: two real steps of the run's own Trainer, with random weights, no download.

    python benchmarks/memory.py run [NAME ...]     one JSON file per configuration in results/memory/
    python benchmarks/memory.py table              docs/memory.md

Every configuration is a process of its own; those whose file is there are skipped. On a GPU, whole models; a shipped
recipe on the card of its name, emulated: torch's allocator gets what the card has beside the CUDA context, so that what
is planned to fit is seen to fit. What is measured is what that allocator reserved. Paged states lie outside it, so that
recipes are measured with 8-bit states that are not paged: as many bytes, all of them on the card.

Without a GPU, the widths and vocabularies that are published, with few decoder layers, in fp32 (bf16 is slow there).
What is measured is what torch's CPU allocator handed out. Dropout is off: CPUs keep its mask in another way.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import tables
import torch
import transformers
from qmixlora.cli.quiet import quiet

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.files import write_json
from qmixlora.memory import card_bytes, card_of, plan
from qmixlora.memory.architectures import ARCHITECTURES, config_of
from qmixlora.memory.planner import CONTEXT, LABELS
from qmixlora.memory.simulation.depth import at_depth
from qmixlora.recipe import Recipe, edited, load_recipe, validate
from qmixlora.training.probe import probe

RESULTS = Path(__file__).parent / "results" / "memory"


@dataclass(frozen=True)
class Configuration:
    """A shipped recipe, on the card of its name, or a model with the default recipe; `layers` of its decoder, or all
    of them; samples of `tokens`, or of `data.max_length`.
    """

    source: str
    overrides: tuple[str, ...] = ()
    tokens: int | None = None
    layers: int | None = None
    vision_layers: int | None = None


LLAVA_7B, QWEN25_7B, QWEN3_8B = (
    "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct",
)  # fmt: skip
EIGHT_BIT = "train.optimizer=adamw_8bit"
CONDITIONAL = ("adapter.pairing=conditional", "adapter.gate=straight_through", "adapter.route_on=all")
LORA = ("adapter.method=lora", "adapter.r=16")  # plain PEFT
LEVERS = {
    "default": (),
    "8-bit": (EIGHT_BIT,),
    "conditional": (*CONDITIONAL, EIGHT_BIT),
    "no-checkpointing": ("train.checkpointing.enabled=false",),
    "offloaded-activations": ("train.checkpointing.offload=true",),
    "offloaded-embeddings": ("model.offload_embeddings=true",),
    "lora-r16": LORA,
    "lora-r16-8-bit": (*LORA, EIGHT_BIT),
}
RECIPES = (
    "llava-1.5-7b-rtx4060-8gb", "qwen2.5-vl-7b-rtx4060-8gb", "internvl3-8b-rtx4060-8gb", "smolvlm2-2.2b-rtx3070-8gb",
    "llava-1.5-13b-rtx3060-12gb", "qwen3-vl-8b-rtx4070-12gb", "gemma-3-12b-rtx4070-12gb",
    "llava-onevision-7b-rtx4070-12gb", "qwen2.5-vl-32b-rtx4090-24gb", "qwen3-vl-32b-rtx3090-24gb",
)  # fmt: skip
GPU = {
    **{f"llava-1.5-7b-{name}": Configuration(LLAVA_7B, edits, 1024) for name, edits in LEVERS.items()},
    "llava-1.5-7b-streamed": Configuration(LLAVA_7B, ("model.stream_layers=24", EIGHT_BIT), 1024),
    "qwen2.5-vl-7b-default": Configuration(QWEN25_7B, (EIGHT_BIT,), 1024),
    "qwen2.5-vl-7b-lora-r16": Configuration(QWEN25_7B, (*LORA, EIGHT_BIT), 1024),
    **{name: Configuration(name, (EIGHT_BIT,)) for name in RECIPES},
}
ON_CPU = ("model.dtype=float32", "adapter.dropout=0", "train.gradient_accumulation=1")
SMALL = (*ON_CPU, "data.max_image_tokens=100")
CPU = {
    "llava-1.5-7b-default": Configuration(LLAVA_7B, ON_CPU[:2], 640, 2, vision_layers=4),
    **{
        f"llava-1.5-7b-{name}": Configuration(LLAVA_7B, (*ON_CPU, *LEVERS[name]), 640, 2, vision_layers=4)
        for name in ("conditional", "lora-r16")
    },
    "qwen2.5-vl-7b": Configuration(QWEN25_7B, SMALL, 384, 2),
    "internvl3-8b": Configuration(
        "OpenGVLab/InternVL3-8B-hf", (*ON_CPU, "data.max_image_tokens=256"), 448, 2, vision_layers=4
    ),
    "gemma-3-4b": Configuration("google/gemma-3-4b-it", ON_CPU, 448, 2, vision_layers=2),
    "qwen3-vl-8b": Configuration(QWEN3_8B, (*SMALL, EIGHT_BIT), 384, 3),  # images' features go to three layers
    "qwen3-vl-8b-two-layers": Configuration(QWEN3_8B, SMALL, 384, 2),  # one of three mergers idle, AdamW at the peak
    **{
        f"llava-1.5-7b-{name}": Configuration(LLAVA_7B, (*ON_CPU, *LEVERS[name]), 640, 2, vision_layers=4)
        for name in ("no-checkpointing", "offloaded-activations")
    },
    "llava-1.5-7b-streamed": Configuration(
        LLAVA_7B, (*ON_CPU, *LEVERS["offloaded-embeddings"], "model.stream_layers=3"), 640, 4, vision_layers=4
    ),
    "smolvlm2-2.2b": Configuration(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct", (*ON_CPU[:2], "data.max_image_tokens=405"), 640, 4
    ),
}


def recipe_of(configuration: Configuration, folder: Path) -> Recipe:
    """The recipe; a model that is cut leaves its configuration in the folder, and goes by its name."""
    if configuration.source in ARCHITECTURES:
        values = {"model": {"id": configuration.source}, "data": {"train": "-"}}
        recipe = edited(validate(values, configuration.source), configuration.overrides)
    else:
        recipe = load_recipe(configuration.source, configuration.overrides)
    if configuration.layers is None:
        return recipe
    config = at_depth(config_of(recipe.model), configuration.layers)
    if configuration.vision_layers is not None:
        config.vision_config.num_hidden_layers = configuration.vision_layers
    config.save_pretrained(folder)
    return edited(recipe, [f"model.id={folder}"])


def card_on(configuration: Configuration) -> int | None:
    """The memory of the card in the name of a shipped recipe, which torch's allocator is held to. In bytes."""
    name = card_of(configuration.source)
    if name is None:
        return None
    card, total = card_bytes(name), torch.cuda.get_device_properties(0).total_memory
    if card > total:
        raise SystemExit(f"{configuration.source}: this GPU has {total / GIB:.1f} GiB only")
    torch.cuda.set_per_process_memory_fraction((card - CONTEXT) / total)
    return card


def execute(name: str) -> dict[str, Any]:
    """One configuration, in this process. Sizes in bytes."""
    on_gpu = torch.cuda.is_available()
    configuration = (GPU if on_gpu else CPU)[name]
    card = card_on(configuration)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the residual of a card that is emulated is not this card's
        start = time.monotonic()
        recipe = recipe_of(configuration, Path(folder))
        planned = plan(recipe, card=card, tokens=configuration.tokens)
        result = {
            "name": name,
            "model": recipe.model.id if configuration.layers is None else configuration.source,
            "recipe": configuration.source if card_of(configuration.source) else None,
            "layers": configuration.layers,
            "vision_layers": configuration.vision_layers,
            "overrides": configuration.overrides,
            "tokens": planned.batch.tokens,
            "image_tokens": planned.batch.image_tokens,
            "micro_batch": recipe.train.micro_batch_size,
            "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "card": card,
            "torch": torch.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "planned_peak": planned.peak,
            "fits": planned.fits,
            "parts": {LABELS.get(name, name): size for name, size in asdict(planned.parts).items()},
            "place": planned.place,
            # what a step takes beyond what lies there all along
            "of_the_step": planned.parts.activations_saved + planned.parts.transients,
        }
        try:
            probed = probe(recipe, planned)
            result |= {"planned": probed.planned, "measured": probed.measured, "built": probed.built}
        except UserError as error:  # out of memory
            result |= {"error": str(error)}
        return {**result, "seconds": time.monotonic() - start}


def run(names: list[str]) -> None:
    kind, known = ("gpu", GPU) if torch.cuda.is_available() else ("cpu", CPU)
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"no such configurations here: {sorted(unknown)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names or known:
        file = RESULTS / f"{kind}-{name}.json"
        if not file.exists():
            print(name, flush=True)
            done = subprocess.run([sys.executable, __file__, "execute", name, "--to", str(file)], check=False)
            if done.returncode:
                print(f"{name} ended with {done.returncode}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "execute", "table"), help="execute: one of them, in this process")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--to", type=Path, help="the file that `execute` writes")
    arguments = parser.parse_args()
    quiet()  # sets up torch's CUDA allocator too: processes that are started from here inherit it
    warnings.simplefilter("ignore")
    if arguments.command == "run":
        run(arguments.names)
    elif arguments.command == "execute":
        result = execute(arguments.names[0])
        write_json(arguments.to, result)
        outcome = (
            result.get("error") or f"planned {result['planned'] / GIB:.3f}, measured {result['measured'] / GIB:.3f}"
        )
        print(f"  {outcome} GiB, {result['seconds']:.0f} s", flush=True)
    else:
        tables.write_memory(RESULTS, {"gpu": list(GPU), "cpu": list(CPU)})


if __name__ == "__main__":
    main()
