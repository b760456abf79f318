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
    history: Annotated[
        bool, typer.Option("--history", help="Go on with the conversation instead of starting a new one each time.")
    ] = False,
) -> None:
    """Ask a run about an image. Each question starts a new conversation, unless --history is given."""
    from .quiet import quiet

    quiet()
    from qmixlora.evaluation import Dialogue
    from qmixlora.session import open_run

    console = Console()
    session = open_run(run)
    questions = iter([prompt]) if prompt else iter(lambda: _ask(console), "")
    dialogue = Dialogue(session, image, task)
    for question in questions:
        console.print(dialogue.ask(question), markup=False)
        if not history:
            dialogue = Dialogue(session, image, task)


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
