"""The planner against what is measured: two real steps of the run's own Trainer, with random weights, no download.

    python benchmarks/memory.py run [NAME ...]     one JSON file per configuration (see cases.py) in results/memory/;
                                                   on a CPU: what wants a GPU are steps of gpu.py
    python benchmarks/memory.py declare            declared.json: predictions of the GPU's, before they are measured
    python benchmarks/memory.py table              docs/memory.md

Every configuration is a process of its own; those whose file is there are skipped. On a GPU, whole models; a shipped
recipe on the card of its name, emulated: torch's allocator gets what the card has beside the CUDA context, so that what
is planned to run is seen to run, and what is not to run out of memory. What is measured is what it reserved.
Paged states lie outside it, so that recipes are measured with 8-bit states that are not paged: as many bytes, all of
them on the card.

Without a GPU, the widths and vocabularies that are published, with few decoder layers, in fp32 (bf16 is slow there).
What is measured is what torch's CPU allocator handed out. Dropout is off: CPUs keep its mask in another way.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# as a consumer card does: data-centre cards take workspaces four times as large, and another attention kernel
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
os.environ.setdefault("TORCH_CUDNN_SDPA_PREFERRED", "0")

import bitsandbytes
import tables
import torch
import transformers
from cases import CPU, GPU, Configuration, recipe_of
from qmixlora.cli.quiet import quiet

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.files import write_json
from qmixlora.memory import card_bytes, card_of, plan
from qmixlora.memory.planner import CONTEXT, LABELS, WORKSPACES
from qmixlora.training.probe import probe

RESULTS = Path(__file__).parent / "results" / "memory"
DECLARED = Path(__file__).with_name("declared.json")


def held_to_card(configuration: Configuration) -> int | None:
    """Hold torch's allocator to the configuration's card, where there is a GPU; return the card's bytes."""
    if configuration.on_card is None:
        return None
    card = card_bytes(configuration.on_card)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        if card > total:
            raise SystemExit(f"{configuration.source}: this GPU has {total / GIB:.1f} GiB only")
        torch.cuda.set_per_process_memory_fraction((card - CONTEXT) / total)
    return card


def prediction(name: str) -> dict[str, Any]:
    """What is declared of a configuration, in bytes: tensors, the whole process, and whether it runs on its card."""
    configuration = GPU[name]
    card = None if configuration.on_card is None else card_bytes(configuration.on_card)
    with tempfile.TemporaryDirectory() as folder:
        planned = plan(recipe_of(configuration, Path(folder)), tokens=configuration.tokens)
    return {
        "name": name,
        "source": configuration.source,
        "overrides": configuration.overrides,
        "tokens": planned.batch.tokens,
        "card": configuration.on_card,
        "tensors": planned.tensors - planned.parts.routing_sums + WORKSPACES,  # a probe records no routing
        "process": planned.peak - planned.parts.routing_sums,
        "runs": None if card is None else planned.peak_with_loading <= card,
    }


def declare() -> None:
    """Write the predictions, with the versions that they were made with."""
    cases = [prediction(name) for name in GPU]
    write_json(DECLARED, {**versions(), "cases": cases})


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def execute(name: str) -> dict[str, Any]:
    """One configuration, in this process. Sizes in bytes."""
    on_gpu = torch.cuda.is_available()
    configuration = (GPU if on_gpu else CPU)[name]
    card = held_to_card(configuration)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the residual of a card that is emulated is not this card's
        start = time.monotonic()
        recipe = recipe_of(configuration, Path(folder))
        planned = plan(recipe, card=card, tokens=configuration.tokens)
        result = {
            "name": name,
            "model": recipe.model.id if configuration.layers is None else configuration.source,
            "recipe": configuration.source if card_of(configuration.source) else None,
            "on_card": configuration.on_card,
            "layers": configuration.layers,
            "vision_layers": configuration.vision_layers,
            "overrides": configuration.overrides,
            "tokens": planned.batch.tokens,
            "image_tokens": planned.batch.image_tokens,
            "micro_batch": recipe.train.micro_batch_size,
            "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "card": card,
            **versions(),
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
            result |= {"used": None if probed.card is None else asdict(probed.card), "context": own_context()}
        except UserError as error:  # out of memory
            result |= {"error": str(error)}
        return {**result, "seconds": time.monotonic() - start}


def own_context() -> int | None:
    """The bytes that this process has taken of the card beside torch's allocator, whatever else runs there; None where
    the driver does not tell processes apart.
    """
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None
    own = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    return None if own is None else int(own) - torch.cuda.memory_reserved()


def run(names: list[str]) -> None:
    if torch.cuda.is_available():
        raise SystemExit("These are a CPU's; on a GPU: python benchmarks/gpu.py run --only memory")
    unknown = set(names) - set(CPU)
    if unknown:
        raise SystemExit(f"no such configurations here: {sorted(unknown)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names or CPU:
        file = RESULTS / f"cpu-{name}.json"
        if not file.exists():
            print(name, flush=True)
            done = subprocess.run([sys.executable, __file__, "execute", name, "--to", str(file)], check=False)
            if done.returncode:
                print(f"{name} ended with {done.returncode}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command", choices=("run", "execute", "declare", "table"), help="execute: one of them, in this process"
    )
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
    elif arguments.command == "declare":
        declare()
    else:
        tables.write_memory(RESULTS, list(CPU))


if __name__ == "__main__":
    main()
