"""qmixlora chat"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qmixlora.errors import UserError

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
    web: Annotated[
        bool, typer.Option("--web", help="On a page, on this machine alone: its answers beside its exports'.")
    ] = False,
) -> None:
    """Talk to a run about an image; answers come as they are made, and the conversation goes on.

    /task T, /image FILE, /export NAME, /routing and /new do what they say; /help lists them.
    """
    here.folder_of_model(run)
    here.file(image, "--image")
    if prompt is not None and not prompt.strip():
        raise UserError("There is nothing to ask.", where="--prompt", fix="Say what, or leave it out to be asked.")
    here.not_both({"--web": web, "--no-history": not history})
    here.not_both({"--web": web, "--prompt": prompt})
    if web:
        _serve(run, image, task)
        return
    from .quiet import quiet

    quiet()
    from qmixlora.chat import Chat

    console = Console()
    talk = Chat(run, image, task, lambda text: console.print(text, end="", markup=False, highlight=False))
    for line in [prompt] if prompt else _lines(console):
        try:
            note = talk.say(line)
            if not history and not line.startswith("/"):
                talk.new()
        except UserError as error:
            if prompt:
                raise
            note = str(error)
        if not line.startswith("/"):
            console.print()
        if note:
            console.print(note, style="dim", markup=False, highlight=False)


def _serve(run: Path, image: Path | None, task: str | None) -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError(
            "The page needs gradio.", where="--web", fix="pip install 'qmixlora[web]', or pip install gradio."
        )
    from .quiet import quiet

    quiet()
    from qmixlora.chat.web import serve

    serve(run, image, task, lambda text: print(text, flush=True))


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
