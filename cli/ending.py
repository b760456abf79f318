"""The last lines of a command: what it made, and what one would type next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from qmixlora.errors import typed

from . import here


def say_next(console: Console, *words: str | Path | int, to: str = "", program: str = "qmixlora") -> None:
    """Print the words of a command as one would type them, and what it is good for."""
    command = escape(typed(*words, program=program))
    console.print(f"Next: [bold]{command}[/bold]{to and f' ({escape(to)})'}", highlight=False, soft_wrap=True)


def say_next_of(console: Console, folder: Path) -> None:
    """Print what comes next for a run, by what it has: scores, exports; for an export, that it can be asked."""
    from qmixlora.chat import opened_exports

    exports = opened_exports(folder)
    if not (folder / "adapter").is_dir() and (folder / "history.jsonl").is_file():
        say_next(console, "train", folder, "--resume", to="the run is not finished")
    elif not (folder / "adapter").is_dir():
        say_next(console, "chat", folder, "--image", "FILE", to="ask it about an image")
    elif not any(folder.glob("evaluation*.json")):
        say_next(console, "eval", folder, to="scores by task")
    elif not any(folder.glob(f"exports/*/{here.FIDELITY}")):
        wrong = typed("eval", folder, "--wrong", 5)
        say_next(console, "export", folder, "--all", to=f"the first wrong answers: {wrong}")
    elif exports:
        say_next(console, "chat", exports[0], "--image", "FILE", to="ask an export about an image")
    else:
        say_next(console, "serve-files", folder, "--for", "llama-server", to="what one types to serve them")
