"""The section of a report on scores: by task, before and after training, or of several runs and their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from qmixlora.errors import UserError, typed
from qmixlora.evaluation import Scores
from qmixlora.evaluation.comparison import Difference, compare
from qmixlora.evaluation.intervals import LEVEL
from qmixlora.webpage import table

from ..charts import Score, draw_scores
from ..record import RunRecord

DRAWN = 24  # tasks: more of them are in the table alone
MEAN = "mean over tasks"
NO_BREAK = "\u00a0"


def scores_section(records: Sequence[RunRecord]) -> str:
    """The scores of all runs that were evaluated, each beside its backbone where that was too, by split."""
    runs, backbones, hints = dict[str, Scores](), dict[str, Scores](), []
    for record in records:
        found = record.scores
        if found is None:
            hints.append(f"{record.name} was not evaluated: {typed('eval', record.folder)}")
            continue
        before = record.backbone_scores
        if before is not None:
            backbones["before" if len(records) == 1 else f"{record.name}, before"] = before
        elif len(records) == 1:
            of = [] if found[0] == "test" else ["--split", found[0]]
            asked = typed("eval", record.folder, *of, "--backbone")
            hints.append(f"The backbone's own scores stand beside these after: {asked}")
        runs["after" if len(records) == 1 else record.name] = found[1]
    series = backbones | runs if len(records) == 1 else runs | backbones  # the first is what others differ from
    splits = dict.fromkeys(scores.split for scores in series.values())
    if len(splits) > 1:
        hints.append(f"What was asked of other splits is not compared: qmixlora eval RUN --split {next(iter(splits))}")
    of_splits = [{name: one for name, one in series.items() if one.split == split} for split in splits]
    charts = "".join(_chart(own, split) + _differences(own) for split, own in zip(splits, of_splits, strict=True))
    told = "".join(f'<p class="quiet">{escape(hint)}</p>' for hint in hints)
    return f"<h2>Scores</h2>{charts}{told}"


def _chart(series: Mapping[str, Scores], split: str) -> str:
    tasks = list(dict.fromkeys(task for scores in series.values() for task in scores.tasks))
    drawn = {
        name: [Score(scores.mean, scores.interval), *(_score(scores, task) for task in tasks[:DRAWN])]
        for name, scores in series.items()
    }
    title = f"Score by task with 95 % intervals, split {split}"
    if len(tasks) > DRAWN:
        title += f" ({DRAWN} of {len(tasks)} tasks)"
    return draw_scores(title, [MEAN, *tasks[:DRAWN]], drawn, _numbers(series, tasks))


def _numbers(series: Mapping[str, Scores], tasks: Sequence[str]) -> str:
    rows = [[MEAN, "", "", *(_told(scores.mean, scores.interval) for scores in series.values())]]
    for task in tasks:
        own = {name: scores.tasks[task] for name, scores in series.items() if task in scores.tasks}
        first = next(iter(own.values()))
        cells = [_told(own[name].score, own[name].interval) if name in own else "" for name in series]
        rows.append([task, first.measure, str(first.count), *cells])
    return table(["task", "metric", "count", *series], rows, tall=True)


def _differences(series: Mapping[str, Scores]) -> str:
    """What differs from the first, where all were asked the same."""
    if len(series) < 2 or not all(scores.predictions for scores in series.values()):
        return ""
    try:
        compared = compare(series)
    except UserError as error:
        return f'<p class="warning">{escape(error.what)}</p>'
    first, several = next(iter(series)), len(series) > 2
    rows = [
        [task if name is None else MEAN, *([other] if several else []), *_difference(difference)]
        for other, mean in compared.means.items()
        for task, name, difference in [(MEAN, MEAN, mean), *((t, None, d) for t, d in compared.tasks[other].items())]
    ]
    head = ["task", *(["model"] if several else []), "difference", "95 %", ""]
    title = escape(f"What is a difference from {first}, paired by sample (permutation test, p < {LEVEL:g})")
    return f"<h3>{title}</h3>{table(head, rows, tall=True)}"


def _difference(difference: Difference) -> list[str]:
    low, high = difference.interval
    verdict = ("better" if difference.points > 0 else "worse") if difference.is_one else "none"
    return [f"{difference.points:+.3f}", f"{low:+.3f} to {high:+.3f}".replace(" ", NO_BREAK), verdict]


def _score(scores: Scores, task: str) -> Score | None:
    own = scores.tasks.get(task)
    return None if own is None else Score(own.score, own.interval)


def _told(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
