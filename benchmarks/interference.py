"""Task interference in LoRA and in the mixture, after the same training: pictures in docs/, and a few numbers.

    python benchmarks/interference.py [--on embedded|real] [NAME ...]

Runs are those of method.py or real.py, each at the best of its learning rates; they are trained where they are not
kept. Of the mixture on the real model the routing is drawn, too. `real.py table` puts them into docs/results.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import experiments
from comparison import Comparison, best_run, trained
from on import COMPARISONS, DOCS, add_on, results_of

from qmixlora.data import indices_by_task, load_conversations
from qmixlora.files import write_json
from qmixlora.inspection.interference import POOLS, Interference, measure_interference
from qmixlora.mixlora.routing_record import FILE as ROUTING
from qmixlora.report.figures import draw_interference, draw_routing
from qmixlora.report.routing import read_routing
from qmixlora.session import make_collator

NAMES = ("lora-r4", "lora-r16", "mixlora")
BATCHES = 4  # of each task


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


@experiments.undone()
def measured(comparison: Comparison, name: str) -> Interference:
    """The interference of a method's run on the validation split, all of which is used."""
    session = trained(comparison, best_run(comparison, name)).session
    collator = make_collator(session.recipe, session.collator.processor)
    rows = load_conversations(str(comparison.make_data() / "validation.json"))
    per_task = min(map(len, indices_by_task(rows).values()))
    session = dataclasses.replace(session, collator=collator)
    return measure_interference(session, rows, batches=min(BATCHES, per_task), batch_size=max(1, per_task // BATCHES))


def draw(comparison: Comparison, names: Sequence[str], results: Path, figure: Path, routing: Path | None) -> None:
    """Measure the methods, keep numbers in `results`, and draw them all into `figure`; routing into a folder."""
    heat_maps = {}
    for name in names:
        interference = measured(comparison, name)
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / f"{name}.json", {"name": name, **summary(interference), "tasks": interference.tasks})
        heat_maps[f"B of {name}"] = interference.mean("B")
        print(name, summary(interference), flush=True)
        folder = comparison.folder_of(best_run(comparison, name))
        if routing is not None and (folder / ROUTING).is_file():
            draw_routing(read_routing(folder), routing)
    draw_interference(interference.tasks, heat_maps, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    add_on(parser)
    arguments = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    pictures = DOCS if arguments.on == "embedded" else DOCS / arguments.on
    routing = None if arguments.on == "embedded" else pictures
    results = results_of("interference", arguments.on)
    draw(COMPARISONS[arguments.on], arguments.names, results, pictures / "interference.png", routing)


if __name__ == "__main__":
    main()
