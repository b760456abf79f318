"""qmixlora report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import here
from .ending import say_next_of


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several stand side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write (default: report.html in the folder of the first).")
    ] = None,
) -> None:
    """A page about a run, or several side by side: scores, curves, answers, routing, exports; one file, no network."""
    for run in runs:
        here.folder_of_run(run)
    here.new_file(out or runs[0] / "report.html", "--out")
    from .quiet import quiet

    quiet()
    from qmixlora.report.page import write_report

    console = Console()
    console.print(f"Report: {write_report(runs, out)}", markup=False, highlight=False, soft_wrap=True)
    say_next_of(console, runs[0])
