"""qmixlora plan"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qmixlora.errors import UserError


def plan(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a shipped recipe.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.micro_batch_size=2.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model with the default recipe, in place of RECIPE.")] = None,
    card: Annotated[str | None, typer.Option(help="A card by name, such as rtx3060-12gb.")] = None,
    vram: Annotated[float | None, typer.Option(min=0.1, help="The memory of a card in GB (of 2^30 bytes).")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of a sample, its image included (default: the data at hand, or data.max_length)."
        ),
    ] = None,
    probing: Annotated[
        bool, typer.Option("--probe", help="Two real steps on this machine with random weights, against the plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
) -> None:
    """Plan the memory of a recipe's training step, and edits that save some; no GPU, weights or data needed."""
    if model is not None and recipe is not None and "=" in recipe:  # the default recipe has overrides too
        overrides, recipe = [recipe, *(overrides or [])], None
    if (recipe is None) == (model is None):
        raise UserError("Name a recipe, or a model with --model.", where="command line")
    if card is not None and vram is not None:
        raise UserError("--card and --vram say the same thing: give one of them.", where="command line")
    from qmixlora.recipe import edited, load_recipe, validate

    if recipe is not None:
        parsed = load_recipe(recipe, overrides or [])
    else:
        parsed = edited(validate({"model": {"id": model}, "data": {"train": "-"}}, f"--model {model}"), overrides or [])
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.device import GIB
    from qmixlora.memory import card_at_hand, card_bytes, card_of, plan_with_advice
    from qmixlora.training.probe import probe

    parsed = resolve(parsed, None, Console(stderr=True))
    named = card or card_of((recipe or "").removesuffix(".yaml"))  # shipped recipes are named after theirs
    size = int(vram * GIB) if vram else card_bytes(named) if named else card_at_hand()
    advice = plan_with_advice(parsed, card=size, tokens=tokens)
    shown = advice.to_dict() | ({"probe": probe(parsed, advice.plan).to_dict()} if probing else {})
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    _show(shown, Console())


def _show(plan: dict[str, Any], console: Console) -> None:
    batch = plan["batch"]
    size = f"{batch['samples']} x {batch['tokens']} tokens, at most {batch['image_tokens']} of a sample from images"
    console.print(f"One training step on {size}: {batch['source']}.", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in plan["parts"].items():
        table.add_row(name, f"{size:.2f}")
    table.add_section()
    table.add_row("[bold]peak", f"[bold]{plan['peak_gib']:.2f}")
    console.print(table)
    console.print(f"Reached in: {plan['place']}.", highlight=False, soft_wrap=True)
    for name, where in (("host", "Meanwhile in host memory"), ("loading", "While loading")):
        sizes = ", ".join(f"{part} {size:.2f}" for part, size in plan[name].items() if size >= 0.005)
        if sizes:
            console.print(f"{where}: {sizes} GiB.", highlight=False, soft_wrap=True)
    if plan["card_gib"] is not None:
        verdict = "[green]fits[/green]" if plan["fits"] else "[bold red]does not fit[/bold red]"
        console.print(
            f"It {verdict} a card with {plan['card_gib']:.1f} GiB for programs: {plan['margin_gib']:.2f} GiB left, "
            f"{plan['needed_margin_gib']:.2f} wanted.",
            highlight=False,
        )
        samples, tokens = plan["largest"]["micro_batch_size"], plan["largest"]["tokens"]
        if samples and tokens:
            console.print(f"Largest that fits: micro-batch {samples}, or samples of {tokens} tokens.", highlight=False)
    if probed := plan.get("probe"):
        console.print(
            f"Probe on {probed['device']}, tensors: planned {probed['planned_gib']:.3f} GiB, "
            f"measured {probed['measured_gib']:.3f} GiB ({probed['residual_gib'] / probed['measured_gib']:+.1%}).",
            highlight=False,
        )
    for edit in plan["advice"]:
        enough = "" if plan["fits"] or not edit.get("fits") else ", and then it fits"
        console.print(f"  {edit['edit']}  saves {edit['saves_gib']:.2f} GiB{enough}", highlight=False, soft_wrap=True)
