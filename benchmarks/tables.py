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
from qmixlora.evaluation.intervals import OF_DIFFERENCES, interval

SPLITS = ("test", "paraphrased", "held_out")
LABELS = {"paraphrased": "other words", "held_out": "held-out tasks"}
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
SECOND = "second-backbone"  # runs of other seeds on another backbone
PICTURES = PAGE.parent / "real"


def read(folder: Path) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Runs by name and learning rate."""
    runs: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[run["name"]][run["learning_rate"]].append(run)
    return runs


def chosen(rates: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs at the learning rate with the best mean validation on the seeds that all rates have; on all of its own
    among those with the most, where they have none in common.
    """
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in rates.values()))
    most = max(map(len, rates.values()))

    def validation(runs: list[dict[str, Any]]) -> tuple[bool, float]:
        compared = [run for run in runs if run["seed"] in seeds] or runs
        return bool(seeds) or len(runs) == most, statistics.fmean(run["validation"]["mean"] for run in compared)

    return max(rates.values(), key=validation)


def mean_and_error(values: Sequence[float]) -> str:
    """`0.861 ± 0.004`: mean and standard error; the mean alone for one seed."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _seeds(seeds: Iterable[int]) -> str:
    """`0, 1, 2`, or `0 to 4`."""
    own = sorted(seeds)
    return f"{own[0]} to {own[-1]}" if len(own) > 3 and own[-1] - own[0] < len(own) else ", ".join(map(str, own))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def summary(
    runs: dict[str, Any], names: Iterable[str], splits: Sequence[str] = SPLITS, *, with_minutes: bool = False
) -> str:
    """One line per method with runs: rates tried, seeds, trainable parameters, minutes of training, and the mean of
    validation and every split (`-` where the method has no answer).
    """
    splits = ("validation", *splits)
    columns = ("method", "learning rate (tried)", "seeds", "trainable", *(("minutes",) if with_minutes else ()))
    rows = []
    for name in names:
        if name not in runs:
            continue
        best = chosen(runs[name])
        tried = ", ".join(f"{rate:g}" for rate in sorted(runs[name]))
        minutes = f"{statistics.fmean(run['train_seconds'] for run in best) / 60:.0f}"
        rows.append(
            (
                name,
                f"{best[0]['learning_rate']:g} ({tried})",
                _seeds(run["seed"] for run in best),
                f"{best[0]['trainable_parameters'] / 1000:.0f} k",
                *((minutes,) if with_minutes else ()),
                *(
                    mean_and_error([run[split]["mean"] for run in best]) if split in best[0] else "-"
                    for split in splits
                ),
            )
        )
    return _table((*columns, *(LABELS.get(split, split) for split in splits)), rows) if rows else "(no runs yet)"


def differences(runs: dict[str, Any], names: Sequence[str], splits: Sequence[str] = SPLITS) -> str:
    """One line per method: how far its mean over tasks is from that of the first on the same seeds, in points, with the
    paired 95 % interval of the bootstrap over tasks.
    """
    reference, *names = names
    if reference not in runs:
        return f"(no runs of {reference} yet)"
    base = {run["seed"]: run for run in chosen(runs[reference])}
    names = [name for name in names if name != reference]
    rows = []
    for name in names:
        own = {run["seed"]: run for run in chosen(runs[name])} if name in runs else {}
        if seeds := sorted(own.keys() & base.keys()):
            pairs = [(own[seed], base[seed]) for seed in seeds]
            cells = (_difference(pairs, split) if split in pairs[0][0] else "-" for split in splits)
            rows.append((name, _seeds(seeds), *cells))
    return _table((f"less {reference}, points", "seeds", *(LABELS.get(split, split) for split in splits)), rows)


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], split: str) -> str:
    """`+2.1 (-1.3 to +5.5)`, each task's score its mean over the seeds."""
    tasks = [task for task in pairs[0][1][split] if task != "mean"]
    one, other = ([statistics.fmean(pair[which][split][task] for pair in pairs) for task in tasks] for which in (0, 1))
    points = 100 * (statistics.fmean(one) - statistics.fmean(other))
    differences = [own - its for own, its in zip(one, other, strict=True)]
    low, high = (100 * end for end in interval(differences, OF_DIFFERENCES))
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"


def per_task(runs: dict[str, Any], names: Sequence[str], split: str) -> str:
    """One line per task, one column per method."""
    columns = [(name, chosen(runs[name])) for name in names if name in runs]
    columns = [(name, best) for name, best in columns if split in best[0]]
    if not columns:
        return "(no runs yet)"
    tasks = [task for task in columns[0][1][0][split] if task != "mean"]
    rows = (
        (task, *(mean_and_error([run[split][task] for run in best]) for _, best in columns))
        for task in (*tasks, "mean")
    )
    return _table(("task", *(name for name, _ in columns)), rows)


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
    runs, second = (_known(folder, names) for folder in (method_folder, method_folder / SECOND))
    rest = [name for name in names if name not in controls[3:]]
    axes = [name for name in rest if "=" in name.split(",")[0] or name == "mixlora"]
    ideas = ["mixlora", *(name for name in rest if name not in axes)]
    blocks = {
        "controls": summary(runs, controls),
        "tasks": _tasks(runs, COMPARED, SPLITS),
        "axes": summary(runs, axes),
        "ideas": summary(runs, ideas),
        SECOND: summary(second, names),
        f"{SECOND}-differences": differences(second, ["lora-r16", *names]),
        "interference": interference(speed_folder.with_name("interference")),
        "speed": speed(speed_folder),
    }
    fill(PAGE, blocks)


def write_real(
    folder: Path, names: Sequence[str], longer: Sequence[str], compared: Sequence[str], splits: Sequence[str]
) -> None:
    """Fill what docs/results.md says of the real language model; task by task of those that are `compared`. `longer`
    are those of more steps. Of both, the first is what the others are held to.
    """
    runs = _known(folder, (*names, *longer))
    blocks = {
        "real": summary(runs, names, splits, with_minutes=True),
        "real-differences": differences(runs, names, splits),
        "real-differences-wider": differences(runs, ["lora-r64", *names], splits),
        "real-longer": summary(runs, longer, splits, with_minutes=True),
        "real-longer-differences": differences(runs, longer, splits),
        "real-tasks": _tasks(runs, compared, splits),
        "real-interference": interference(folder.with_name("interference-real")),
        "real-wordings": wordings(folder.with_name("wordings-real")),
        "real-pictures": "\n".join(f"![{path.stem}](real/{path.name})" for path in sorted(PICTURES.glob("*.png"))),
    }
    fill(PAGE, blocks)


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
    return "\n\n".join(f"{LABELS.get(split, split)}:\n\n{per_task(runs, names, split)}" for split in splits)


def interference(folder: Path) -> str:
    """What benchmarks/interference.py left: the mean matrices off the diagonal, in numbers."""
    titles = ("method", "pool", "mean of I_ij", "mean size", "share negative", "most negative")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    keys = ("mean", "mean_size", "negative", "worst")
    rows = [(run["name"], pool, *(f"{run[pool][key]:.3f}" for key in keys)) for run in runs for pool in ("A", "B")]
    return _table(titles, rows)


def wordings(folder: Path) -> str:
    """What benchmarks/wordings.py left: how alike questions are routed, means over tasks."""
    titles = ("mixture", "seed", "one task, words of training", "one task, other words", "different tasks")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rows = []
    for run in runs:
        tasks = run["same_words"].keys() & run["other_words"].keys()
        means = (statistics.fmean(run[how][task] for task in tasks) for how in ("same_words", "other_words"))
        rows.append((run["name"], str(run["seed"]), *(f"{mean:.2f}" for mean in (*means, run["between_tasks"]))))
    return _table(titles, rows) if rows else "(no runs yet)"


def write_export(block: str, runs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Fill a frontier of docs/export.md: one line per method, in the order of `names`, and share of the mean that
    polishing started from.
    """
    if not runs:
        fill(PAGE.with_name("export.md"), {block: "(no runs yet)"})
        return
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
    fill(PAGE.with_name("export.md"), {block: "\n".join(lines)})


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
