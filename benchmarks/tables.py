"""docs/results.md from the runs that are kept: tables between markers, so that the words around them stay."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qmixlora.device import GIB

SPLITS = ("test", "paraphrased", "held_out")
LABELS = {"held_out": "held-out tasks"}
PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def read(folder: Path) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Runs by name and learning rate."""
    runs: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[run["name"]][run["learning_rate"]].append(run)
    return runs


def chosen(rates: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs at the learning rate with the best mean validation, among the rates with the most seeds."""
    most = max(len(runs) for runs in rates.values())
    complete = (runs for runs in rates.values() if len(runs) == most)
    return max(complete, key=lambda runs: statistics.fmean(run["validation"]["mean"] for run in runs))


def mean_and_error(values: Sequence[float]) -> str:
    """`0.861 ± 0.004`: mean and standard error; the mean alone for one seed."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def summary(runs: dict[str, Any], names: Iterable[str], splits: Sequence[str] = SPLITS) -> str:
    """One line per method: rates tried, seeds, trainable parameters, and the mean of validation and every split."""
    splits = ("validation", *splits)
    titles = ("method", "learning rate (tried)", "seeds", "trainable", *(LABELS.get(split, split) for split in splits))
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in names:
        if name not in runs:
            continue
        best = chosen(runs[name])
        tried = ", ".join(f"{rate:g}" for rate in sorted(runs[name]))
        scores = (mean_and_error([run[split]["mean"] for run in best]) for split in splits)
        size = f"{best[0]['trainable_parameters'] / 1000:.0f} k"
        lines.append(
            f"| {name} | {best[0]['learning_rate']:g} ({tried}) | {len(best)} | {size} | {' | '.join(scores)} |"
        )
    return "\n".join(lines)


def per_task(runs: dict[str, Any], names: Sequence[str], split: str) -> str:
    """One line per task, one column per method."""
    columns = [(name, chosen(runs[name])) for name in names if name in runs]
    tasks = [task for task in columns[0][1][0][split] if task != "mean"]
    lines = ["| task | " + " | ".join(name for name, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for task in (*tasks, "mean"):
        cells = (mean_and_error([run[split][task] for run in best]) for _, best in columns)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(folder: Path) -> str:
    """The ratios that benchmarks/speed.py left, one block per machine and size."""
    blocks = []
    for path in sorted(folder.glob("*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        compiled = ", torch.compile" if measured["compiled"] else ""
        head = f"{measured['size']}{compiled}, {measured['hardware']}, torch {measured['torch']}, {measured['date']}"
        lines = [f"**{head}**\n", "| variant | layer | whole step | step, ms |", "|---|---|---|---|"]
        for name, step in measured["step"].items():
            cells = f"{measured['layer'][name]['ratio']:.2f} | {step['ratio']:.2f} | {step['milliseconds']:.1f}"
            lines.append(f"| {name} | {cells} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


COMPARED = ("mixlora", "lora-r4", "lora-r16", "lora-r22")


def write(method_folder: Path, speed_folder: Path, names: Sequence[str], controls: Sequence[str]) -> None:
    """Fill docs/results.md; `names` are the methods in the order of their lines, `controls` the first table."""
    runs = _known(method_folder, names)
    rest = [name for name in names if name not in controls[3:]]
    axes = [name for name in rest if "=" in name.split(",")[0] or name == "mixlora"]
    ideas = ["mixlora", *(name for name in rest if name not in axes)]
    blocks = {
        "controls": summary(runs, controls),
        "tasks": _tasks(runs, COMPARED, SPLITS),
        "axes": summary(runs, axes),
        "ideas": summary(runs, ideas),
        "interference": interference(speed_folder.with_name("interference")),
        "speed": speed(speed_folder),
    }
    fill(PAGE, blocks)


def write_real(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Fill what docs/results.md says of the real language model."""
    runs = _known(folder, names)
    fill(PAGE, {"real": summary(runs, names, splits), "real-tasks": _tasks(runs, names, splits)})


def _known(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The runs in a folder. Raises ValueError for a method that is none of `names`."""
    runs = read(folder)
    unknown = set(runs) - set(names)
    if unknown:
        raise ValueError(f"runs of methods that do not exist any more: {sorted(unknown)}")
    return runs


def _tasks(runs: dict[str, Any], names: Sequence[str], splits: Sequence[str]) -> str:
    if not any(name in runs for name in names):
        return "(no runs yet)"
    return "\n\n".join(f"{split}:\n\n{per_task(runs, names, split)}" for split in splits)


def interference(folder: Path) -> str:
    """What benchmarks/interference.py left: the mean matrices off the diagonal, in numbers."""
    lines = [
        "| method | pool | mean of I_ij | mean size | share negative | most negative |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        for pool in ("A", "B"):
            row = run[pool]
            numbers = " | ".join(f"{row[key]:.3f}" for key in ("mean", "mean_size", "negative", "worst"))
            lines.append(f"| {run['name']} | {pool} | {numbers} |")
    return "\n".join(lines)


def write_export(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Fill the frontier of docs/export.md: one line per method, in the order of `names`, and share of the mean that
    polishing started from.
    """
    steps = sorted({int(count) for run in runs for count in run["exported"]})
    lines = [
        "| trained as | start | seeds | live | mean alone | "
        + " | ".join(f"{count} steps" for count in steps[1:])
        + " |",
        "|---" * (len(steps) + 4) + "|",
    ]
    for name, start in itertools.product(names, sorted({run["start"] for run in runs})):
        mine = [run for run in runs if (run["name"], run["start"]) == (name, start)]
        if not mine:
            continue
        live = mean_and_error([run["live"]["mean"] for run in mine]) if "live" in mine[0] else "-"
        cells = [[run["exported"][str(n)]["mean"] for run in mine if str(n) in run["exported"]] for n in steps]
        head = f"| {name} | {start:g} | {len(mine)} | {live} | "
        lines.append(head + " | ".join(mean_and_error(cell) if cell else "" for cell in cells) + " |")
    fill(PAGE.with_name("export.md"), {"frontier": "\n".join(lines)})


def write_memory(folder: Path, names: list[str]) -> None:
    """Fill the probes of docs/memory.md: what was planned and measured on a CPU, by name."""
    lines = [
        "| configuration | device | planned, GiB | measured, GiB | difference | of the step's own |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        file = folder / f"cpu-{name}.json"
        lines.append(f"| {name} | {_probe(json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None)} |")
    fill(PAGE.with_name("memory.md"), {"probes": "\n".join(lines)})


def _probe(probe: dict[str, Any] | None) -> str:
    """The cells of a line. "Of the step's own": the difference as a share of what lies there for a moment only."""
    if probe is None:
        return "CPU | | not measured | | "
    planned, measured = probe["planned"], probe["measured"]
    share = f"{(planned - measured) / measured:+.2%} | {(planned - measured) / probe['of_the_step']:+.2%}"
    return f"{probe['hardware']}, {probe['layers']} layers | {planned / GIB:.3f} | {measured / GIB:.3f} | {share}"


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end NAME -->`. Raises ValueError for a missing marker."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, started, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        if not started or not ended:
            raise ValueError(f"{page} has no {start} ... {end}")
        text = f"{before}{start}\n{block}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
