"""qmixlora new"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from qmixlora.errors import UserError
from qmixlora.recipe import Edit, validate

from . import here
from .ending import say_next


def new(
    model: Annotated[str, typer.Option(help="Hub id or local folder.")],
    data: Annotated[str, typer.Option(help="File, folder or hub data set with the training samples.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that are settled, such as adapter.r=8.")
    ] = None,
    card: Annotated[str | None, typer.Option(help="A card by name (default: the GPU at hand).")] = None,
    vram: Annotated[float | None, typer.Option(min=0.1, help="The memory of a card in GB (of 2^30 bytes).")] = None,
    prefer: Annotated[
        Literal["speed", "memory", "quality"],
        typer.Option(help="The fastest that fits; the least memory; or nothing that may cost accuracy, if possible."),
    ] = "speed",
    out: Annotated[Path | None, typer.Option(help="The file to write (default: MODEL.yaml here).")] = None,
) -> None:
    """Write a recipe for your model, data and card, and say why it is what it is."""
    here.not_both({"--card": card, "--vram": vram})
    name = re.sub(r"[^\w.-]+", "-", Path(model).name.lower())
    target = out or Path(f"{name}.yaml")
    if target.exists():
        raise here.there_already(target)  # before the model is planned, which takes long
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.memory import card_at_hand, card_size
    from qmixlora.memory.architectures import config_of
    from qmixlora.memory.commented import text_of, words_of
    from qmixlora.memory.proposal import propose

    size = card_size(card, vram) or card_at_hand()
    if size is None:
        raise UserError("There is no GPU here.", where="command line", fix="Name one with --card, or --vram GB.")
    asked = validate({"model": {"id": model}, "data": {"train": data}}, "command line")
    local = resolve(asked, None, Console(stderr=True))
    proposal = propose(local.model.id, str(local.data.train), size, prefer, f"runs/{target.stem}", overrides or [])
    named = Edit({"model.id": model, "data.train": data}).apply(proposal.recipe)  # not the folders of what is made here
    proposal = replace(proposal, recipe=named)
    called = card or (f"a card with {vram:g} GB" if vram else "the GPU at hand")
    here.write_new(target, text_of(proposal, called))
    console = Console(highlight=False)
    for line in words_of(proposal, config_of(local.model), card):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"Written: {target}.", markup=False, soft_wrap=True)
    say_next(console, "train", target)
