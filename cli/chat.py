"""qmixlora chat"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def chat(
    run: Annotated[Path, typer.Argument(help="The folder of a run, an export, or any model.")],
    image: Annotated[Path | None, typer.Option(help="An image to talk about.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this once and stop (default: ask until an empty line).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, for adapters that route on it.")] = None,
) -> None:
    """Ask a run about an image. Each question starts a new conversation."""
    from .quiet import quiet

    quiet()
    from qmixlora.evaluation import answer_question
    from qmixlora.session import open_run

    console = Console()
    session = open_run(run)
    questions = iter([prompt]) if prompt else iter(lambda: _ask(console), "")
    for question in questions:
        console.print(answer_question(session, question, image, task), markup=False)


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
