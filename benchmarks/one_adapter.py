"""Servers with one adapter per request: what the exports of the demo give there, against the live mixture.

    python benchmarks/one_adapter.py run SEED ... --work DIR [--tasks T ...]     DIR as `demo.py run --work` has left it
    python benchmarks/one_adapter.py words              the picker alone, on the real data set's plain English
    python benchmarks/one_adapter.py table              docs/export.md

One JSON file per backbone in results/one_adapter/. *by task*: every sample through its own task's adapter; *picked*:
through the one that the picker names; *together*: one polished adapter for all (`--together`); *sum* and *mean*: PEFT's
`add_weighted_adapter` over the same ten adapters, by concatenation, which adds the updates exactly; *linear* and
*ties*: its other ways. Exports that are there are used as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from qmixlora.cli.quiet import quiet

quiet()

import tables  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from rich.console import Console  # noqa: E402

from qmixlora.data import IMAGE, indices_by_answer, indices_by_task, load_conversations, only_tasks  # noqa: E402
from qmixlora.demo import resolve  # noqa: E402
from qmixlora.evaluation import answer_rows, score  # noqa: E402
from qmixlora.export import Request, export  # noqa: E402
from qmixlora.export.job import FOLDER, Job  # noqa: E402
from qmixlora.export.picker import PICKER, fit_picker, make_picker  # noqa: E402
from qmixlora.export.static import Learned, StaticAdapter, learned_by, lora_session, put, read  # noqa: E402
from qmixlora.files import cache_folder, write_json  # noqa: E402
from qmixlora.recipe import load_recipe  # noqa: E402
from qmixlora.serving.pick import Pick, Picker  # noqa: E402
from qmixlora.session import TunedSession, open_session, open_tuned_run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "one_adapter"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
SPLITS = ("test", "paraphrased", "held_out")
COLUMNS = ("live", "by task", "picked", "together", "mean", "sum", "linear", "ties")
SUMS: dict[str, dict[str, Any]] = {  # of `add_weighted_adapter`; the weight of each of T adapters is `share` / T or 1
    "mean": {"share": True, "combination_type": "cat"},
    "sum": {"share": False, "combination_type": "cat"},
    "linear": {"share": True, "combination_type": "linear"},
    "ties": {"share": False, "combination_type": "ties", "density": 0.5},
}


@dataclass(frozen=True)
class Demo:
    """A run of the demo, and the rows that it is asked."""

    run: Path
    rows: dict[str, Dataset]
    session: TunedSession
    learned: Learned

    def scores(self, session: TunedSession, split: str) -> dict[str, float]:
        return self.scored(split, answer_rows(session, self.rows[split]))

    def scored(self, split: str, answers: Sequence[str]) -> dict[str, float]:
        scores = score(self.rows[split], list(answers), split, self.session.recipe.data)
        return {"mean": scores.mean, **{task: own.score for task, own in scores.tasks.items()}}

    def adapter(self, name: str) -> StaticAdapter:
        """An export, of whatever form, on a base that has the trained projector."""
        return StaticAdapter(read(self.run / FOLDER / f"{name}-lora").updates, in_base=self.learned.modules)


def execute(seed: int, work: Path, tasks: Sequence[str]) -> dict[str, Any]:
    folder, start = work / f"demo-{seed}", time.monotonic()
    session = open_tuned_run(folder / "run")
    data = Path(session.recipe.data.sources[0]).parent
    rows = {split: load_conversations(str(data / f"{split}.json")) for split in SPLITS}
    tasks = tasks or list(indices_by_task(rows["test"]))
    rows |= {split: only_tasks(rows[split], tasks, split) for split in SPLITS[:2]}
    demo = Demo(folder / "run", rows, session, learned_by(session.model, session.anatomy.projector_targets))
    result: dict[str, Any] = {split: {"live": demo.scores(session, split)} for split in SPLITS}
    picks = _picks(demo)
    request = Request(tasks=tuple(tasks), together=True, fingerprint=False)
    (together,) = export(demo.run, request, Console(quiet=True))
    adapters = {task: demo.adapter(task) for task in [*tasks, *(own.task for split in SPLITS for own in picks[split])]}
    static = lora_session(session, adapters[tasks[0]])
    for split in SPLITS:
        names = [own.task for own in picks[split]]
        result[split]["picked"] = demo.scored(split, _answers(static, adapters, rows[split], names))
        if split != "held_out":
            result[split]["by task"] = demo.scored(split, _answers(static, adapters, rows[split], rows[split]["task"]))
        put(static.model, demo.adapter(together.folder.name.removesuffix("-lora")))
        result[split]["together"] = demo.scores(static, split)
    for name, make in _sums(static, {task: adapters[task] for task in tasks}).items():
        make()
        result |= {split: {**result[split], name: demo.scores(static, split)} for split in SPLITS}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    told = {split: _told(rows[split]["task"], own) for split, own in picks.items()}
    return {"seed": seed, "versions": versions, "picker": told, **result, "seconds": time.monotonic() - start}


def _picks(demo: Demo) -> dict[str, list[Pick]]:
    session = demo.session
    job = Job(demo.run, session.recipe, Request(), Console(quiet=True), session.collator)
    fitted = make_picker(job, session, [])
    assert fitted is not None, "there are exports of several tasks"
    fitted.write(demo.run / FOLDER / PICKER)
    picker = Picker(demo.run / FOLDER / PICKER)
    questions = {
        split: [row["turns"][0]["text"].replace(IMAGE, "") for row in rows] for split, rows in demo.rows.items()
    }
    return {split: [picker.pick(question) for question in own] for split, own in questions.items()}


def words() -> dict[str, Any]:
    """The picker on the instructions of the real data set, of which four wordings in ten are in no training sample."""
    name = "real-cpu"
    recipe = resolve(load_recipe(name, ["train.output=unused"]), cache_folder() / "real-data", Console(stderr=True))
    session = open_session(recipe, [])
    files = Path(recipe.data.sources[0])
    train, *rows = (load_conversations(str(files.with_name(f"{split}.json"))) for split in ("train", *SPLITS))
    tasks = list(indices_by_answer(train))
    fitted = fit_picker(session, session.collator.processor.tokenizer, train, {task: task for task in tasks})
    assert fitted is not None, "of several tasks"
    with tempfile.TemporaryDirectory() as scratch:
        fitted.write(Path(scratch) / PICKER)
        picker = Picker(Path(scratch) / PICKER)
    told: dict[str, Any] = {"backbone": "real", "tasks": tasks}
    for split, own in zip(SPLITS, rows, strict=True):
        picks = [picker.pick(row["turns"][0]["text"].replace(IMAGE, "")) for row in own]
        right = [(one.sure, one.task == task) for one, task in zip(picks, own["task"], strict=True)]
        by_sure = {
            f"{low:g} to {high:g}": [len(among), sum(among)]
            for low, high in itertools.pairwise((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0))
            if (among := [hit for sure, hit in right if low <= sure < high])
        }
        told[split] = {**_told(own["task"], picks), "picks_and_hits_by_sure": by_sure}
    return told


def _told(tasks: Sequence[str], picks: Sequence[Pick]) -> dict[str, Any]:
    """What the picker said of a split: how often it was right, how sure, how often the words were familiar."""
    by_task = {task: [own for other, own in zip(tasks, picks, strict=True) if other == task] for task in tasks}
    return {
        "accuracy": statistics.fmean(own.task == task for task, own in zip(tasks, picks, strict=True)),
        "familiar": statistics.fmean(own.familiar for own in picks),
        "sure": statistics.fmean(own.sure for own in picks),
        "picked": {task: sorted({one.task for one in own}) for task, own in by_task.items()},
        "example": asdict(picks[0]),
    }


def _answers(
    static: TunedSession, adapters: dict[str, StaticAdapter], rows: Dataset, names: Sequence[str]
) -> list[str]:
    """The answers to some rows, each through the adapter of this name."""
    answers = [""] * len(rows)
    for name in dict.fromkeys(names):
        put(static.model, adapters[name])
        own = [index for index, other in enumerate(names) if other == name]
        for index, answer in zip(own, answer_rows(static, rows.select(own)), strict=True):
            answers[index] = answer
    return answers


def _sums(static: TunedSession, adapters: dict[str, StaticAdapter]) -> dict[str, Callable[[], None]]:
    """PEFT's sums of the adapters, each of which is made and switched to when it is called."""
    model, config = static.model, static.model.peft_config[static.model.active_adapter]
    for name, adapter in adapters.items():
        model.add_adapter(name, config)
        model.set_adapter(name)
        put(model, adapter)

    def make(name: str, share: bool, **options: Any) -> None:
        weight = 1 / len(adapters) if share else 1.0
        model.base_model.add_weighted_adapter(list(adapters), [weight] * len(adapters), name, **options)
        model.set_adapter(name)

    return {name: (lambda name=name, options=options: make(name, **options)) for name, options in SUMS.items()}


def write_tables() -> None:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("seed-*.json"))]
    lines = ["| | test | other words | tasks never trained |", "|---|---|---|---|"]
    for column in COLUMNS:
        means = [[run[split][column]["mean"] for run in runs if column in run[split]] for split in SPLITS]
        lines.append(f"| {column} | {' | '.join(_range(own) for own in means)} |")
    for name in ("accuracy", "familiar", "sure"):
        means = [[run["picker"][split][name] for run in runs] for split in SPLITS]
        cells = [_range(own) for own in means]
        cells[-1] = "-" if name == "accuracy" else cells[-1]  # no task of theirs is among those to pick from
        lines.append(f"| the picker's {name} | {' | '.join(cells)} |")
    tables.fill(Path(__file__).parents[1] / "docs" / "export.md", {"one adapter": "\n".join(lines)})


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, mean, high = min(values), statistics.fmean(values), max(values)
    return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("seeds", type=int, nargs="+")
    runner.add_argument("--work", type=Path, required=True, help="folder of backbones and runs")
    runner.add_argument("--tasks", nargs="*", default=[], help="of the demo, to take apart and together (default: all)")
    verbs.add_parser("words")
    verbs.add_parser("table")
    arguments = parser.parse_args()
    if arguments.verb == "table":
        write_tables()
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.verb == "words":
        write_json(RESULTS / "words.json", words())
        return
    for seed in arguments.seeds:
        file = RESULTS / f"{'+'.join([*arguments.tasks, ''])}seed-{seed}.json"
        if not file.exists():
            write_json(file, execute(seed, arguments.work, arguments.tasks))
            print(f"seed {seed}: {file}", flush=True)


if __name__ == "__main__":
    main()
