"""What the mixture is worth: LoRA and mixtures on the embedded backbone, same data, steps, batch and scale.

    python benchmarks/method.py run [--worker 0/2]                                what is planned in methods.py
    python benchmarks/method.py run NAME ... [--learning-rate LR ...] [--seeds 0 1]
    python benchmarks/method.py table                                             docs/results.md

Each run is one small JSON file in benchmarks/results/method/ (comparison.py).
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tables
from command_line import Plan, main
from comparison import Comparison
from methods import CONTROLS, GONE, LEARNING_RATE, LEARNING_RATES, METHODS, SEEDS

from qmixlora.demo.dataset import make_dataset

RESULTS = Path(__file__).parent / "results" / "method"
DATA = Path(tempfile.gettempdir()) / "qmixlora-benchmark-data"
SPLITS = {"train": 2500, "validation": 40, "test": 100}  # samples per task: a larger test than the demo's


@cache
def data_folder() -> Path:
    return make_dataset(DATA, splits=SPLITS)


EMBEDDED = Comparison(
    recipe="tiny-cpu",
    results=RESULTS,
    make_data=data_folder,
    methods=METHODS,
    reported=("test", "paraphrased", "held_out"),
    steps=1000,
    batch=32,
    learning_rate=LEARNING_RATE,
    overrides=("train.eval_batch_size=200",),
)

if __name__ == "__main__":
    plan = Plan(LEARNING_RATES, finalists=CONTROLS, seeds=SEEDS)
    main(
        __doc__, EMBEDDED, plan, lambda: tables.write(RESULTS, RESULTS.with_name("speed"), [*METHODS, *GONE], CONTROLS)
    )
