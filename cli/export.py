"""qmixlora export"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qmixlora.errors import UserError

from . import here
from .ending import say_next
from .output import print_json

if TYPE_CHECKING:
    from qmixlora.export import Fidelity
    from qmixlora.export.measurement import Measurement
    from qmixlora.export.targets import Form as FormName


class Form(StrEnum):
    """The form of an export: `targets.Form`, for typer takes no list of Literal."""

    lora = "lora"
    merged = "merged"
    gguf = "gguf"
    live_gguf = "live-gguf"


Base = Literal["nf4", "original"]
Projector = Literal["base", "adapter", "low-rank"]

Tasks = Annotated[
    list[str] | None, typer.Option(help="A task, one export each; T=0.7 with others mixes them into one.")
]
Forms = Annotated[
    list[Form] | None,
    typer.Option(
        "--as",
        help="lora: a plain PEFT adapter. merged: a whole checkpoint. gguf: a LoRA for llama.cpp. live-gguf: for it,"
        " the mixture itself (adapter.router: model), once for all tasks.",
    ),
]
MergeInto = Annotated[
    Base | None, typer.Option(help="What to merge into: as training saw it (nf4, default), or as it is on the disk.")
]
Polish = Annotated[
    int | None, typer.Option(min=0, help="Further steps on the task (default: the recipe's, where it lost some).")
]
OfProjector = Annotated[
    Projector | None,
    typer.Option(help="Of a LoRA: in a base of its own (default), whole in the adapter, or as low-rank factors."),
]
ProjectorRank = Annotated[int | None, typer.Option(min=1, help="Of --projector low-rank (default: the adapter's).")]
Fingerprint = Annotated[bool, typer.Option("--fingerprint/--no-fingerprint", help="Made for `qmixlora check`.")]


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    task: Tasks = None,
    every: Annotated[bool, typer.Option("--all", help="Every task of the run.")] = False,
    forms: Forms = None,
    together: Annotated[bool, typer.Option("--together", help="One static adapter for all these tasks.")] = False,
    base: MergeInto = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the updates to this rank (default: exact).")] = None,
    polish: Polish = None,
    calibration: Annotated[str | None, typer.Option(help="Samples for the routing (default: as trained).")] = None,
    projector: OfProjector = None,
    projector_rank: ProjectorRank = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Held-out samples per task (default: recipe).")] = None,
    fingerprint: Fingerprint = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON, and nothing else.")] = False,
) -> None:
    """Turn a run into ordinary adapters or checkpoints, in RUN/exports, and report the losses."""
    here.folder_of_run(run)
    wanted: tuple[FormName, ...] = tuple(form.value for form in dict.fromkeys(forms or [Form.lora]))
    here.only_with("--as merged", "merged" in wanted, {"--base": base})
    form_of_projector = _projector(projector, projector_rank, wanted)
    from .quiet import quiet

    quiet()
    _check_tasks(every, task or [], wanted)
    from qmixlora.export import Request
    from qmixlora.export import export as run_export
    from qmixlora.report.page import refresh_report

    console = Console(stderr=as_json)
    request = Request(
        tasks=tuple(task or ()),
        forms=wanted,
        together=together,
        base=base or "nf4",
        rank=rank,
        polish=polish,
        calibration=calibration,
        projector=form_of_projector,
        projector_rank=projector_rank,
        samples=samples,
        fingerprint=fingerprint,
    )
    exports = run_export(run, request, console)
    if as_json:
        print_json([fidelity.to_dict() for fidelity in exports])
    console.print(refresh_report(run), markup=False, highlight=False, soft_wrap=True)
    if exports and not as_json:
        _show(exports, run, console)


def _check_tasks(every: bool, named: list[str], wanted: tuple[FormName, ...]) -> None:
    """Raise UserError if tasks are named beside all of them, or if none are and a form is made of tasks."""
    from qmixlora.export import are_of_tasks

    here.not_both({"--all": every, "--task": named})
    if not every and not named and are_of_tasks(wanted):
        raise UserError("Say which tasks: --task T (as often as needed), or --all.", where="command line")


def _projector(form: Projector | None, rank: int | None, wanted: tuple[FormName, ...]) -> Projector:
    """Where a trained projector goes: a rank alone means low-rank. Raises UserError where the two disagree, or no
    adapter is made that it would go into.
    """
    has_adapters = not {"merged", "live-gguf"}.issuperset(wanted)
    here.only_with("--as lora", has_adapters, {"--projector": form, "--projector-rank": rank})
    if rank is None or form in (None, "low-rank"):
        return form or ("base" if rank is None else "low-rank")
    raise UserError(
        f"--projector-rank is of --projector low-rank, and this is {form}.",
        where="command line",
        fix=f"Type --projector {form} alone, or --projector low-rank --projector-rank {rank}.",
    )


def _show(exports: list[Fidelity], run: Path, console: Console) -> None:
    from qmixlora.report.readings import lossy, read_export

    console.print(_table(exports))
    own = {one.folder.name: (one.update_error.mean, one.live.score, one.score) for one in exports}
    for reading in lossy((name, read_export(*figures)) for name, figures in own.items()):
        console.print(reading.styled(), highlight=False, soft_wrap=True)
    for line in (line for fidelity in exports for line in fidelity.warnings):
        console.print(f"[bold red]warning[/bold red] {escape(line)}", highlight=False, soft_wrap=True)
    console.print(
        f"Written to {run / 'exports'}, each with its fidelity.json.", markup=False, highlight=False, soft_wrap=True
    )
    from qmixlora.chat import opened_exports

    made = {one.folder.resolve() for one in exports}
    if opened := [folder for folder in opened_exports(run) if folder.resolve() in made]:
        say_next(console, "chat", opened[0], "--image", "FILE")
    else:
        say_next(console, "serve-files", run, "--for", "llama-server", to="what one types to serve them")
    for line in dict.fromkeys(note for fidelity in exports for note in fidelity.notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(exports: list[Fidelity]) -> Table:
    """One line per export: the scores of the live model, of its adapter and of other forms of it."""
    measured: dict[str, dict[str, Measurement]] = {}
    for fidelity in exports:
        measured.setdefault("+".join(fidelity.tasks), {}).update(fidelity.measurements)
    forms = list(dict.fromkeys(form for own in measured.values() for form in own))
    splits = dict.fromkeys(fidelity.split for fidelity in exports)
    metrics = ", ".join(sorted({metric for fidelity in exports for metric in fidelity.live.metrics.values()}))
    title = f"Score ({metrics}), split {', '.join(splits)}{' (not held out: trained on)' if 'train' in splits else ''}"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD)
    table.add_column("export", no_wrap=True)
    for column in ("polished", "live", *forms, "same words", "loss", "update error"):
        table.add_column(column, justify="right")
    last = {"+".join(fidelity.tasks): fidelity for fidelity in exports}
    for name, fidelity in last.items():
        own = fidelity.measurements[fidelity.form]
        table.add_row(
            escape(name),
            f"{fidelity.polish_steps} steps" if fidelity.polish_steps else "-",
            f"{fidelity.live.score:.3f}",
            *(f"{measured[name][form].score:.3f}" for form in forms),
            f"{own.agreement(fidelity.live):.2f}",
            f"{own.loss - fidelity.live.loss:+.3f}",
            f"{fidelity.update_error.mean:.2f}",
        )
    if len(last) > 1:
        scores = [
            [fidelity.live.score, *(measured[name][form].score for form in forms)] for name, fidelity in last.items()
        ]
        table.add_section()
        table.add_row("mean", "", *(f"{sum(column) / len(column):.3f}" for column in zip(*scores, strict=True)))
    return table
