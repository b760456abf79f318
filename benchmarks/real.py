"""What the mixture is worth on a language model that knows words: SmolLM2-135M, its tasks in plain English.

    python benchmarks/real.py run [--worker 0/2]                                  what is planned here
    python benchmarks/real.py run NAME ... [--learning-rate LR ...] [--seeds 0 1] [--budget MINUTES]
    python benchmarks/real.py table                                               docs/results.md

Needs the extra `real`; the backbone is made on first use. Each run is one small JSON file in benchmarks/results/real/
(comparison.py). A core with a thread of its own for each worker (OMP_NUM_THREADS=1) is faster than two threads in one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tables
from command_line import Plan, main
from comparison import Comparison
from methods import GONE, METHODS, lora

from qmixlora.demo.made_here import make_data
from qmixlora.recipe import REAL

NAMES = (
    "mixlora", "E=64,R=16", "gate=dense", "gate=dense,E=16,R=16", "gate=dense,E=64,R=64",
    "gate=dense,E=16,R=16,quiet-routers", "gate=dense,E=64,R=64,quiet-routers",
    "router=block", "router=model", "router=block,E=64,R=16", "paper", "frozen-routers", "random-routing",
    "pairing=shared_a", "pairing=shared_a,E=64,R=16", "shared=4", "shared=8", "shared=16,E=80,R=16",
    "states-0.25-embedding", "states-0.25-uniform", "states-0.5-embedding", "states-0.5-uniform",
    "question-ahead-4", "question-ahead-4,E=64,R=16",
    "word-dropout", "condition-dropout-0.2", "condition-noise-0.5", "arrow", "lora-per-task",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "real"
OF_ONE_LENGTH = {**{f"lora-r{r}": lora(r) for r in (16, 4, 32, 64)}, **{name: METHODS[name] for name in NAMES}}
LONGER = {  # twice the steps; the first is what the others are held to
    f"{name},steps=600": replace(OF_ONE_LENGTH[name], overrides=(*OF_ONE_LENGTH[name].overrides, "train.max_steps=600"))
    for name in (
        "lora-r16",
        "lora-r4",
        "lora-r64",
        "lora-per-task",
        "mixlora",
        "router=block,E=64,R=16",
        "gate=dense,E=16,R=16",
    )
}
REAL_METHODS = {**OF_ONE_LENGTH, **LONGER}
COMPARED = ("mixlora", "lora-r16", "lora-r64", "arrow", "lora-per-task")  # task by task
FINALISTS = ("lora-r16", "lora-r64", "mixlora")  # and what leads on validation
LEARNING_RATES = {  # tried on seed 0
    "lora-r4": (1e-3, 2e-3),
    "lora-r16": (5e-4, 1e-3, 2e-3),
    "lora-r64": (2.5e-4, 5e-4, 1e-3),
    "mixlora": (5e-4, 1e-3, 2e-3),
    "paper": (1e-3, 2e-3),
}


@cache
def data_folder() -> Path:
    return make_data(REAL, None)


ON_SMOLLM2 = Comparison(
    recipe="real-cpu",
    results=RESULTS,
    make_data=data_folder,
    methods=REAL_METHODS,
    reported=("test", "paraphrased", "held_out", "conversations"),
    steps=300,
    batch=16,
    learning_rate=1e-3,
    overrides=(
        # what a user's card computes in; on a core with AVX-512 a step takes 0.6 of float32's time, where attention is
        # not sdpa's, whose backward pass is slow in bfloat16 on a CPU
        "model.dtype=bfloat16",
        "model.attention=eager",
        # micro-batches of about one length pad less
        "train.micro_batch_size=8",
        "train.gradient_accumulation=2",
        "train.eval_batch_size=64",  # a step of decoding takes 0.26 s for 32 samples and 0.46 for 96
    ),
)


def write_tables() -> None:
    tables.write_real(RESULTS, [*OF_ONE_LENGTH, *GONE], list(LONGER), COMPARED, ON_SMOLLM2.reported)


if __name__ == "__main__":
    plan = Plan(LEARNING_RATES, finalists=FINALISTS, seeds=(0, 1, 2))
    main(__doc__, ON_SMOLLM2, plan, write_tables)
