"""The report of a run, or of several side by side: one HTML file, from the files of their folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from qmixlora.errors import UserError, typed
from qmixlora.webpage import write_html

from .record import REPORT, RunRecord, read_records
from .sections.answers import SHOWN, answers_section
from .sections.exports import exports_section
from .sections.learning import learning_section
from .sections.origin import origin_section
from .sections.routing import interference_section, routing_section
from .sections.scores import scores_section


def write_report(folders: Sequence[Path], path: Path | None = None) -> Path:
    """Write the report of one run (`report.html` in its folder unless `path` is given) or of several side by side.

    Raises:
        UserError: a folder is named twice, is no run's, or a file in it is damaged.
    """
    records = read_records(folders)
    path = path or folders[0] / REPORT
    title = " and ".join(record.name for record in records)
    parts = [f"<h1>{escape(title)}</h1>", *map(_summary, records), scores_section(records), learning_section(records)]
    for record in records:
        parts += _of_one(record, len(records))
    write_html(path, f"qmixlora: {title}", [part for part in parts if part])
    return path


def refresh_report(folder: Path) -> str:
    """Write the report of a run whose files have changed, and say where; or why not, whatever it is: the report is not
    what the command was for.
    """
    try:
        return f"Report: {write_report([folder])}"
    except UserError as error:
        return f"The report was not written: {error.what} ({error.where})"
    except OSError as error:
        return f"The report was not written: {error.strerror} ({folder})"
    except Exception as error:
        return (
            f"The report was not written: {type(error).__name__}: {error} ({folder}). This is a mistake of qmixlora's; "
            f"`{typed('report', folder)}` says where."
        )


def _summary(record: RunRecord) -> str:
    """What a run came to, in a line."""
    step = max((one["step"] for one in record.logged()), default=0)
    routing = record.routing
    tasks = (
        len(routing.tasks) + len(routing.unseen) if routing else len(record.scores[1].tasks) if record.scores else None
    )
    told = [f"{record.recipe.adapter.method}, {step} steps"]
    told += [f"{tasks} task{'' if tasks == 1 else 's'}"] if tasks else []
    if record.scores is not None:
        split, scores = record.scores
        interval = f" ({scores.interval[0]:.3f} to {scores.interval[1]:.3f})" if scores.interval else ""
        told.append(f"mean score {scores.mean:.3f}{interval} on split {split}")
    told += [f"{len(record.exports)} exports"] if record.exports else []
    damaged = f"Left out, since they are damaged: {'; '.join(record.damaged)}." if record.damaged else ""
    warning = f'<p class="warning">{escape(damaged)}</p>' if damaged else ""
    return f"<p><b>{escape(record.name)}</b>: {escape(', '.join(told))}.</p>{warning}"


def _of_one(record: RunRecord, of: int) -> Iterator[str]:
    if of > 1:
        yield f"<h2>{escape(record.name)}</h2>"
    yield origin_section(record)
    if record.scores is not None and record.scores[1].predictions:
        yield answers_section(record.scores[1].predictions, -(-SHOWN // of))
    if record.routing is not None:
        yield routing_section(record.routing)
    if record.interference is not None:
        yield interference_section(record.interference)
    yield exports_section(record)
