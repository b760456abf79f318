"""qmixlora serve-files"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .ending import say_next

Server = Literal["vllm", "llama-server", "ollama", "sglang"]


def serve_files(
    exports: Annotated[Path, typer.Argument(help="A folder of exports, or of the run that they were made of.")],
    server: Annotated[Server, typer.Option("--for", help="Which server.")],
) -> None:
    """Write what one types to serve exports, with a client and the check of each task: EXPORTS/serve-SERVER/."""
    from qmixlora.serving.files.exports import read_exports
    from qmixlora.serving.files.folder import README, START, write_files
    from qmixlora.serving.files.places import PLACES

    folder = write_files(read_exports(exports), server, PLACES[server])
    console = Console()
    told = f"Written to {folder}; questions and checks of each task: {folder / README}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    say_next(console, folder / START, to="starts the server", program="sh")
