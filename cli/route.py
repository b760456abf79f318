"""qmixlora route"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qmixlora.errors import UserError, typed
from qmixlora.files import clear_read_errors

from . import here

LIVE = Path("exports") / "live"
ROUTER = "router.safetensors"


def route(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of its export --as live-gguf.")],
    instruction: Annotated[str, typer.Argument(help="The question, without its image.")],
    image: Annotated[bool, typer.Option("--image", help="The question has an image.")] = False,
) -> None:
    """Print the scales with which to ask llama-server for an instruction: the "lora" of the request, as JSON."""
    here.folder(run)
    folder = run if (run / ROUTER).is_file() else run / LIVE
    if not (folder / ROUTER).is_file():
        raise UserError(
            "There is no router to ask.",
            where=str(folder),
            fix=f"Export it: {typed('export', run, '--as', 'live-gguf')} (of a run with adapter.router=model).",
        )
    from qmixlora.serving.route import scales

    with clear_read_errors(folder, "Export it again."):
        made = scales(folder, instruction, image)
    print(json.dumps({"lora": made}))
