"""qmixlora chat"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import here


def chat(
    run: Annotated[Path, typer.Argument(help="The folder of a run, an export, or any model.")],
    image: Annotated[Path | None, typer.Option(help="An image to talk about.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this once and stop (default: ask until an empty line).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, for adapters that route on it.")] = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Whether a question goes on with the conversation.")
    ] = True,
) -> None:
    """Talk to a run about an image; answers come as they are made, and the conversation goes on.

    /task T, /image FILE, /export NAME, /routing and /new do what they say; /help lists them.
    """
    here.folder_of_model(run)
    here.file(image, "--image")
    from .quiet import quiet

    quiet()
    from qmixlora.errors import UserError
    from qmixlora.evaluation import Chat

    console = Console()
    talk = Chat(run, image, task, lambda text: console.print(text, end="", markup=False, highlight=False))
    for line in [prompt] if prompt else _lines(console):
        try:
            note = talk.say(line)
        except UserError as error:
            if prompt:
                raise
            note = str(error)
        if not line.startswith("/"):
            console.print()
        if note:
            console.print(note, style="dim", markup=False, highlight=False)
        if not history and not line.startswith("/"):
            talk.new()


def _lines(console: Console) -> Iterator[str]:
    """What is typed, until an empty line or the end."""
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
