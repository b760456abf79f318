"""What the splits of a data set hold, for people, `--json` and the run's `survey.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from unicodedata import category, normalize

import pyarrow
import pyarrow.compute
from datasets import Dataset

from qmixlora.data.images.keys import image_keys
from qmixlora.data.reading.loading import Loaded
from qmixlora.data.splits.identity import text_keys
from qmixlora.data.splits.loading import is_cut, splits_of
from qmixlora.errors import did_you_mean, some
from qmixlora.recipe import Data, Train

from .padding import Padding, padding_of
from .verdicts import Verdict

COMMON = 5  # answers of a task, and examples in a warning, that are told
CLOSED = 5  # times that the answers of a task come on average, where it is one of choosing among them
FEW = 20  # samples that show nothing of the kind
BATCH = 10_000  # rows at a time


@dataclass(frozen=True)
class Answers:
    """The answers of a task that end its samples: how many different ones, and the shares of the most frequent."""

    different: int
    shares: dict[str, float]


@dataclass(frozen=True)
class SplitFacts:
    """One split: all its samples, and how many are left out, by reason, with (where, what) of the first; those that are
    used, by task; their lengths in tokens as a run makes them, and the share of padding (None where nothing fits); how
    many samples have how many images; the answers of every task; samples that occur again.
    """

    split: str
    samples: int
    left_out: int
    reasons: dict[str, int]
    refusals: list[list[str]]
    tasks: dict[str, int]
    tokens: dict[str, float] | None
    padding: Padding | None
    images: dict[int, int]
    answers: dict[str, Answers]
    duplicates: int


@dataclass(frozen=True)
class DataFacts:
    """All splits of a recipe's data that were looked at, and what in them is likely a mistake, with what to do."""

    splits: list[SplitFacts]
    warnings: list[str]

    @property
    def left_out(self) -> int:
        """Samples that a run cannot use."""
        return sum(split.left_out for split in self.splits)

    @property
    def samples_of_a_batch(self) -> float:
        """The samples of a training micro-batch (`Padding`), where rows of training were looked at and are left."""
        padding = next(split.padding for split in self.splits if split.split == "train")
        assert padding is not None, "rows are left"
        return padding.samples_of_a_batch

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora data`, and of `survey.json`."""
        return asdict(self)


def facts_of(
    split: str, loaded: Loaded, verdict: Verdict, answers: Mapping[str, Counter[str]], spec: Train
) -> SplitFacts:
    """The facts of one split; `spec` says how batches are made of it."""
    found = verdict.survey
    return SplitFacts(
        split=split,
        samples=len(loaded.rows) + loaded.refused.count,
        left_out=verdict.refusals.count,
        reasons=dict(Counter(verdict.refusals.reasons).most_common()),
        refusals=verdict.refusals.first,
        tasks={task: counts.total() for task, counts in sorted(answers.items())},
        tokens=None if found is None else found.in_tokens(),
        padding=None if found is None else padding_of(found.lengths, spec),
        images=verdict.images,
        answers={task: _told(counts) for task, counts in sorted(answers.items())},
        duplicates=verdict.duplicates,
    )


def answers_by_task(rows: Dataset) -> dict[str, Counter[str]]:
    """How often each answer ends a sample, by task."""
    found: dict[str, Counter[str]] = {}
    for table in rows.select_columns(["turns", "task"]).with_format("arrow").iter(BATCH):
        turns = table.column("turns").combine_chunks()
        ends = pyarrow.compute.cumulative_sum(turns.value_lengths())
        last = turns.flatten().field("text").take(pyarrow.compute.subtract(ends, 1))
        pairs = pyarrow.table({"task": table.column("task"), "answer": last})
        for one in pairs.group_by(["task", "answer"]).aggregate([([], "count_all")]).to_pylist():
            found.setdefault(one["task"], Counter())[one["answer"]] += one["count_all"]
    return found


def warnings_of(
    data: Data, rows: Mapping[str, Dataset], answers: Mapping[str, Mapping[str, Counter[str]]]
) -> list[str]:
    """What in held-out splits contradicts the training data, tasks that are hardly two, and metrics of no task, each
    with what to do; by split, their rows and `answers_by_task`.
    """
    if "train" not in rows:
        return []
    told = []
    for split in rows:
        if split == "train":
            continue
        seen = _not_held_out(answers["train"], answers[split]) if is_cut(data, split) else _seen(rows, split)
        told += [f"data.{split}: {warning}" for warning in seen]
        told += [
            f"data.{split}: {warning}"
            for task, counts in answers[split].items()
            if (warning := _outside(task, counts, answers["train"].get(task)))
        ]
    return [*told, *_tasks_alike(answers["train"]), *_metrics_of_no_task(data, answers)]


def _tasks_alike(tasks: Iterable[str]) -> Iterator[str]:
    """What to say of tasks whose names differ in capitals, white space or what is not seen alone."""
    alike: dict[str, list[str]] = {}
    for task in tasks:
        alike.setdefault("".join(_as_seen(task).split()).casefold(), []).append(task)
    for names in alike.values():
        if len(names) > 1:
            tells_apart = repr if len({*map(_as_seen, names)}) == len(names) else ascii
            written = " and ".join(map(tells_apart, sorted(names)))
            yield f"data.train: {written} are tasks of their own: if one is meant, write it in one way."


def _as_seen(name: str) -> str:
    """A name, the same for all ways to write what looks the same (an accent as a character of its own, U+200B)."""
    return "".join(one for one in normalize("NFKC", name) if category(one) != "Cf")


def _metrics_of_no_task(data: Data, answers: Mapping[str, Mapping[str, Counter[str]]]) -> list[str]:
    """What to say of names in `data.metrics` that no task has; nothing where a split was not looked at."""
    if not all(split in answers or is_cut(data, split) for split in splits_of(data)):
        return []
    tasks, told = sorted({task for own in answers.values() for task in own}), []
    for name in sorted(set(data.metrics) - {"*", *tasks}):
        meant = did_you_mean(name, tasks, cutoff=0)
        told.append(f"data.metrics.{name}: the data has no task of this name, so that the metric is of none.{meant}")
    return told


def _seen(rows: Mapping[str, Dataset], split: str) -> Iterator[str]:
    """What a split of its own shares with the training data."""
    count, trained = len(rows[split]), rows["train"]
    fix = f"it tells little of unseen ones; remove them, or let data.{split}: 0.1 cut a split that shares none."
    if shown := len(image_keys(rows[split]).rows_with(image_keys(trained).keys_N)):
        yield f"{shown} of {count} samples show images of the training data, so that {fix}"
    if texts := text_keys(rows[split]):
        known = {*text_keys(trained).values()}
        if same := sum(key in known for key in texts.values()):
            yield f"{same} of {count} samples are in the training data too, so that {fix}"


def _not_held_out(trained: Mapping[str, Counter[str]], held_out: Mapping[str, Counter[str]]) -> Iterator[str]:
    """What to say of tasks that a cut split has no row of."""
    if lacking := [repr(task) for task in trained if task not in held_out]:
        yield (
            f"{len(lacking)} of {len(trained)} tasks have no sample in it ({some(lacking, COMMON)}), since they have "
            "few: nothing is measured of them; cut more, or give a file of its own."
        )


def _outside(task: str, held_out: Counter[str], trained: Counter[str] | None) -> str | None:
    """What to say of answers that a task never gives in training, although it chooses among few there."""
    if trained is None:
        return f"the task {task!r} is not in the training data; is it misspelt?" if task != "all" else None
    if trained.total() < FEW or trained.total() < CLOSED * len(trained):
        return None
    unknown = Counter({answer: count for answer, count in held_out.items() if answer not in trained})
    if not unknown:
        return None
    examples = some([repr(answer) for answer, _ in unknown.most_common()], COMMON)
    return (
        f"{unknown.total()} answers of the task {task!r} are none of the {len(trained)} that it has in training "
        f"({examples}): write them alike, or give training samples with them."
    )


def _told(counts: Counter[str]) -> Answers:
    common = counts.most_common(COMMON)
    return Answers(len(counts), {answer: count / counts.total() for answer, count in common})
