"""The demo on several embedded backbones: `run SEED ...` (runs that are there are kept), `table`.

The backbone is trained on the spot, so that every machine has another one. Seeds of it stand for machines.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from qmixlora.cli.quiet import quiet

quiet()

from rich.console import Console  # noqa: E402

from qmixlora.demo.backbone import make_backbone  # noqa: E402
from qmixlora.demo.run import run_demo  # noqa: E402
from qmixlora.files import write_json  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "demo"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
COLUMNS = ("backbone", "tuned", "exported", "merged", "blind")


def run(seed: int, work: Path) -> None:
    """Make the backbone of a seed, run the demo on it, and keep its summary."""
    path = RESULTS / f"seed-{seed}.json"
    if path.is_file():
        return
    console = Console()
    backbone = make_backbone(work / f"backbone-{seed}", seed=seed)
    summary = run_demo(work / f"demo-{seed}", [f"model.id={backbone}"], console)
    exports = sorted((work / f"demo-{seed}" / "run" / "exports").glob("*-lora/fidelity.json"))
    fidelities = [json.loads(file.read_text(encoding="utf-8")) for file in exports]
    polished = {task: one["polish_steps"] for one in fidelities for task in one["tasks"]}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    write_json(path, {"seed": seed, "versions": versions, "polish_steps": polished, **summary})


def table() -> str:
    """Mean and range over the seeds, as Markdown; with the share of the live score that exports keep."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("seed-*.json"))]
    lines = ["| task | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for task in runs[0]["tasks"]["tuned"]:
        cells = (_range([_score(one["tasks"][column][task]) for one in runs]) for column in COLUMNS)
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    lines.append("| **mean** | " + " | ".join(_range([one[column] for one in runs], 3) for column in COLUMNS) + " |")
    held_out = (_range([_held_out(one, column) for one in runs]) for column in COLUMNS)
    lines.append("| mean of tasks never trained | " + " | ".join(held_out) + " |")
    kept = (
        f"{form} / tuned {_range([one[form] / one['tuned'] for one in runs], 3)}" for form in ("exported", "merged")
    )
    lines.append(f"\n{len(runs)} backbones; {', '.join(kept)}; seconds {_range([one['seconds'] for one in runs], 0)}")
    return "\n".join(lines)


def _score(task: dict[str, Any]) -> float:
    return float(task["score"] if "score" in task else task["exact_match"])  # as runs before 2026-11-26 called it


def _held_out(one: dict[str, Any], column: str) -> float | None:
    score: float | None = one["held_out"].get(column)
    return score


def _range(values: list[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, mean, high = (f"{f(known):.{digits}f}" for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("seeds", type=int, nargs="+")
    runner.add_argument("--work", type=Path, required=True, help="folder for backbones and runs")
    verbs.add_parser("table")
    arguments = parser.parse_args()
    if arguments.verb == "table":
        print(table())
        return
    for seed in arguments.seeds:
        run(seed, arguments.work)


if __name__ == "__main__":
    main()
