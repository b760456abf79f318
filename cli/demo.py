"""qmixlora demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .output import print_json


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for data set, run and summary.")] = Path("demo"),
    real: Annotated[
        bool, typer.Option("--real", help="On SmolLM2-135M, a real language model (extra `real`; hours on a CPU).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
) -> None:
    """The embedded default, end to end: backbone, data, train, evaluate; ends with one table."""
    from .quiet import quiet

    quiet()
    from qmixlora.demo.run import ON_EMBEDDED, ON_REAL, run_demo

    summary = run_demo(out, overrides or [], Console(stderr=as_json), ON_REAL if real else ON_EMBEDDED)
    if as_json:
        print_json(summary)
