"""qmixlora pick"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qmixlora.errors import UserError
from qmixlora.files import clear_read_errors

from . import here
from .ending import say_next
from .output import print_json

UNSURE = 0.1  # below it most picks are wrong, in other words than those of training (docs/export.md)
FORMS = ("lora", "merged", "gguf")


def pick(
    exports: Annotated[Path, typer.Argument(help="The folder of exports of a run, or the run's.")],
    instruction: Annotated[str, typer.Argument(help="The words of a request.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the pick as JSON, and nothing else.")] = False,
) -> None:
    """Name the export for an instruction, where a server takes one adapter per request."""
    from qmixlora.serving.pick import PICKER, Picker

    folder = next((path for path in (exports, exports / "exports") if (path / "picker" / PICKER).is_file()), None)
    if folder is None:
        raise UserError(
            "There is no picker.",
            where=str(exports),
            fix="It is made with the exports of two tasks or more: qmixlora export RUN --all.",
        )
    with clear_read_errors(folder / "picker" / PICKER, "Export again."):
        picker = Picker(folder / "picker")
    if not instruction.strip():
        raise UserError("The instruction has no words.", where="command line")
    picked = picker.pick(instruction)
    there = [str(folder / f"{picked.name}-{form}") for form in FORMS if (folder / f"{picked.name}-{form}").is_dir()]
    if as_json:
        print_json({**asdict(picked), "exports": there})
        return
    console = Console()
    console.print(f"{picked.name}, sure {picked.sure:.2f}", markup=False, highlight=False)
    for path in there:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    if not picked.familiar:
        console.print("It is farther from the task's instructions than any that the run was trained on.")
    if picked.sure < UNSURE:
        advice = "serve the run itself, or one export for all tasks (export --all --together)."
        console.print(f"The next task is hardly farther: where that is so, {advice}", highlight=False, soft_wrap=True)
    opened = [path for path in there if any((Path(path) / file).is_file() for file in here.MODEL)]
    if opened:
        say_next(console, "chat", opened[0], "--image", "FILE", "--prompt", instruction)
    elif there:  # files for llama.cpp alone
        say_next(console, "serve-files", exports, "--for", "llama-server", to="what one types to serve them")
