"""qmixlora export"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qmixlora.errors import UserError


class Form(StrEnum):
    """What an export is."""

    lora = "lora"
    merged = "merged"


Base = Literal["nf4", "original"]


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task, one export each; T=0.7 with others mixes them into one.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every task of the run.")] = False,
    forms: Annotated[
        list[Form] | None, typer.Option("--as", help="lora: a plain PEFT adapter. merged: a whole checkpoint.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="One static adapter for all these tasks.")] = False,
    base: Annotated[
        Base, typer.Option(help="What to merge into: as training saw it, or as it is on the disk.")
    ] = "nf4",
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the updates to this rank (default: exact).")] = None,
    polish: Annotated[
        int | None,
        typer.Option(min=0, help="Further steps on the task (default: the recipe's, where the mean lost something)."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Samples to take the routing from (default: as counted in training).")
    ] = None,
    projector_rank: Annotated[
        int | None, typer.Option(min=1, help="Write the trained projector as LoRA of this rank (vLLM).")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out samples per task to measure on (default: recipe).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON, and nothing else.")] = False,
) -> None:
    """Turn a run into ordinary adapters or checkpoints, in RUN/exports, and report what that loses."""
    if every == bool(task):
        raise UserError("Say which tasks: --task T (as often as needed), or --all.", where="command line")
    from .quiet import quiet

    quiet()
    from qmixlora.export import Request
    from qmixlora.export import export as run_export

    console = Console(stderr=as_json)
    request = Request(
        tasks=tuple(task or ()),
        forms=tuple(form.value for form in dict.fromkeys(forms or [Form.lora])),
        together=together,
        base=base,
        rank=rank,
        polish=polish,
        calibration=calibration,
        projector_rank=projector_rank,
        samples=samples,
    )
    reports = run_export(run, request, console)
    if as_json:
        print(json.dumps(reports, indent=2))
        return
    _show(reports, run, console)


def _show(reports: list[dict[str, Any]], run: Path, console: Console) -> None:
    console.print(_table(reports))
    for report in reports:
        for line in report["warnings"]:
            console.print(f"[bold red]warning[/bold red] {line}", highlight=False, soft_wrap=True)
    console.print(f"Written to {run / 'exports'}, each with its fidelity.json.", highlight=False, soft_wrap=True)
    for line in dict.fromkeys(note for report in reports for note in report["notes"]):
        console.print(line, highlight=False, soft_wrap=True)


def _table(reports: list[dict[str, Any]]) -> Table:
    """One line per export: what the live model scores, and what its adapter and merged checkpoint do."""
    first = reports[0]
    names = [form for form in ("lora", "merged") if any(form in report["exact_match"] for report in reports)]
    title = f"Exact match, split {first['split']}" + ("" if first["held_out"] else " (not held out: trained on)")
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("export", no_wrap=True)
    for column in ("polished", "live", *names, "same words", "loss", "update error"):
        table.add_column(column, justify="right")
    last = {
        "+".join(report["tasks"]): report for report in reports
    }  # of an adapter and its merged checkpoint, the latter
    for name, report in last.items():
        scores, name_of_last = report["exact_match"], names[-1]
        table.add_row(
            name,
            f"{report['polish_steps']} steps" if report["polish_steps"] else "-",
            *(f"{scores[form]:.3f}" for form in ("live", *names)),
            f"{report['agreement'][name_of_last]:.2f}",
            f"{report['loss'][name_of_last] - report['loss']['live']:+.3f}",
            f"{report['update_error']['mean']:.2f}",
        )
    if len(last) > 1:
        means = (sum(r["exact_match"][form] for r in last.values()) / len(last) for form in ("live", *names))
        table.add_section()
        table.add_row("mean", "", *(f"{mean:.3f}" for mean in means))
    return table
