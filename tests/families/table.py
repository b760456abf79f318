"""Make docs/families.md by a run over variants: `python -m tests.families.table [NAME]...` (some minutes).

Outcomes are kept in benchmarks/results/families.json, so that a new family need not wait for the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import transformers

from .outcomes import WORKS, outcomes
from .stages import STAGES
from .variant import variants

ROOT = Path(__file__).parents[2]
DOCUMENT, RESULTS = ROOT / "docs" / "families.md", ROOT / "benchmarks" / "results" / "families.json"
HEAD = """# Families

Every model that `AutoModelForImageTextToText` loads goes the same way through qmixlora, as far as its parts can be told
apart. What is known to work was tried: below, each row is one class of models as a tiny random checkpoint with its real
processor class, made from the file of its name in `tests/families/variants/`. It went through the stages of the columns
(`tests/families/stages.py` says what each asserts), in NF4 on a CPU. Weights were random: this says that the parts fit
together and compute what they should, not how well a model learns.

This page is written by `python -m tests.families.table` and not by hand. To add a family, add one file of facts there.

`+` works · `-` is refused by name before or in that stage, for the reason below the table · `!` fails.
"""


def page(results: dict[str, dict[str, str]]) -> str:
    """The document for outcomes by variant and stage."""
    names = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft", "bitsandbytes")]
    whole = sum(set(row.values()) == {WORKS} for row in results.values())
    lines = [HEAD, f"{len(results)} variants, {whole} of them in every stage ({', '.join(names)}).", ""]
    lines += [f"| variant | {' | '.join(STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
    notes = []
    for name, row in results.items():
        signs = ["+" if row[stage] == WORKS else "-" if row[stage].startswith("refused") else "!" for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(signs)} |")
        reasons: dict[str, list[str]] = {}
        for stage, outcome in row.items():
            if outcome != WORKS:
                reasons.setdefault(" ".join(outcome.split()), []).append(stage)
        for reason, stages in reasons.items():
            where = "every stage" if len(stages) == len(STAGES) else ", ".join(stages)
            notes.append(f"- **{name}** ({where}): {reason}")
    return "\n".join([*lines, "", "## What does not work, and why", "", *notes, ""])


def _prepare() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _outcomes(name: str) -> dict[str, str]:
    told = outcomes(variants()[name])
    bad = [stage for stage, outcome in told.items() if outcome != WORKS]
    print(f"{name}: {', '.join(bad) or 'all'}", file=sys.stderr, flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="variants to run (default: those whose outcomes are not kept yet)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    names = list(variants())
    wanted = arguments.names or [name for name in names if name not in kept]
    with ProcessPoolExecutor(arguments.jobs, initializer=_prepare) as pool:
        running = {pool.submit(_outcomes, name): name for name in wanted}
        for done in as_completed(running):
            kept[running[done]] = done.result()
            RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(page({name: kept[name] for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
