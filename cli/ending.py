"""The last line of a command: what one would type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape


def say_next(console: Console, *words: str | Path, to: str = "") -> None:
    """Print the words of a command as one would type them, and what it is good for."""
    command = escape(shlex.join(["qmixlora", *map(str, words)]))
    console.print(f"Next: [bold]{command}[/bold]{to and f' ({to})'}", highlight=False, soft_wrap=True)
