"""Task interference in LoRA and in the mixture, after the same training: docs/interference.png and a few numbers.

python benchmarks/interference.py
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from comparison import Run, trained
from method import EMBEDDED, RESULTS, data_folder
from methods import METHODS

from qmixlora.data import Collator, load_conversations
from qmixlora.files import write_json
from qmixlora.inspection.interference import POOLS, Interference, measure_interference
from qmixlora.report.figures import draw_interference

FOLDER = RESULTS.with_name("interference")
RUNS = {"lora-r4": 2e-3, "lora-r16": 1.5e-3, "mixlora": 3e-3}


def summary(interference: Interference) -> dict[str, Any]:
    """Of each pool's mean matrix off the diagonal: its mean, its mean size, the negative share, the most negative."""
    result = {}
    for pool in POOLS:
        mean_TT = interference.mean(pool)
        others = mean_TT[~torch.eye(len(mean_TT), dtype=torch.bool)]
        result[pool] = {
            "mean": float(others.mean()),
            "mean_size": float(others.abs().mean()),
            "negative": float((others < 0).float().mean()),
            "worst": float(others.min()),
        }
    return result


def main() -> None:
    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    heat_maps = {}
    for name, rate in RUNS.items():
        session, _ = trained(EMBEDDED, Run(name, METHODS[name], rate, 0))
        session = dataclasses.replace(session, collator=Collator(session.collator.processor, 128))
        rows = load_conversations(str(data_folder() / "validation.json"))
        interference = measure_interference(session, rows, batch_size=10)
        write_json(FOLDER / f"{name}.json", {"name": name, **summary(interference), "tasks": interference.tasks})
        heat_maps[f"B of {name}"] = interference.mean("B")
        print(name, summary(interference), flush=True)
    draw_interference(interference.tasks, heat_maps, Path(__file__).parents[1] / "docs" / "interference.png")


if __name__ == "__main__":
    main()
