"""qmixlora doctor"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from qmixlora.recipe import Recipe, validate

from . import here
from .ending import say_next
from .output import print_json

SAMPLES, OVER = 4, 0.15  # where none are given


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Look at a model instead: a folder, an id on the hub, embedded or real.")
    ] = None,
    nf4: Annotated[
        bool,
        typer.Option("--nf4", help="With --model: measure what NF4 does to each kind of layer (loads the weights)."),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="With --nf4: data whose first samples the layers are run on.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="With --data: so many samples (default: 4).")] = None,
    over: Annotated[
        float | None,
        typer.Option(help="With --nf4: the error from which a kind is advised to be kept (default: 0.15)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Examine this machine, or the parts of a model: what there is, and what to do about what is lacking."""
    from .quiet import quiet

    quiet()
    _check_options(model, nf4, {"--data": data, "--samples": samples, "--over": over})
    if model is not None and nf4:
        _measure(model, data, samples or SAMPLES, OVER if over is None else over, as_json)
        return
    if model is not None:
        _look_at(model, as_json)
        return
    from qmixlora.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'lack'}  {finding.what}: {finding.found}")
            if not finding.ok:
                print(f"      {finding.advice}")
        if all(finding.ok for finding in findings):
            _say_next()
    raise SystemExit(int(not all(finding.ok for finding in findings)))


def _check_options(model: str | None, nf4: bool, of_nf4: dict[str, object]) -> None:
    """Raise UserError for an option without the one that it goes with."""
    here.only_with("--model", model is not None, {"--nf4": nf4 or None, **of_nf4})
    here.only_with("--nf4", nf4, of_nf4)
    here.only_with("--data", of_nf4["--data"] is not None, {"--samples": of_nf4["--samples"]})


def _say_next() -> None:
    from qmixlora.device import GIB
    from qmixlora.memory import card_at_hand

    card, console = card_at_hand(), Console()
    if card is None:
        say_next(console, "demo", to="the whole way on an embedded toy, on this CPU")
    else:
        say_next(console, "recipes", "list", "--vram", round(card / GIB), to="recipes for this card")


def _look_at(model: str, as_json: bool) -> None:
    from dataclasses import asdict

    from qmixlora.backbone import parts_of

    parts = parts_of(_recipe_of(model).model)
    if as_json:
        print_json({**asdict(parts), "neither": parts.shares.of_neither})
        return
    for what, found in parts.lines():
        print(f"{what}: {found}")
    say_next(Console(), "new", "--model", model, "--data", "DATA", to="a recipe for it and your data")


def _recipe_of(model: str, data: str | None = None) -> Recipe:
    """A recipe of a model and data, those that are made here (`embedded`, `real`) in their place."""
    from qmixlora.demo import resolve
    from qmixlora.session import NO_DATA

    train = NO_DATA.train if data is None else data
    named = validate({"model": {"id": model}, "data": {"train": train}}, "command line")
    return resolve(named, None, Console(stderr=True))


def _measure(model: str, data: str | None, samples: int, over: float, as_json: bool) -> None:
    from dataclasses import asdict

    from qmixlora.inspection.damage import damage_lines, measure_nf4

    recipe = _recipe_of(model, data)
    kinds = measure_nf4(recipe.model, None if data is None else str(recipe.data.train), samples)
    if as_json:
        print_json([asdict(kind) for kind in kinds])
        return
    for line in damage_lines(kinds, over):
        print(line)
    say_next(Console(), "new", "--model", model, "--data", data or "DATA", to="a recipe for it and your data")
