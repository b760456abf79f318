"""qmixlora plan"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qmixlora.errors import UserError
from qmixlora.garbage import without_garbage_collection
from qmixlora.recipe import Recipe, edited, load_recipe, validate

from . import here
from .ending import say_next
from .output import print_json


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
    parsed = _recipe(recipe, overrides or [], model)
    here.not_both({"--card": card, "--vram": vram})
    from .quiet import quiet

    quiet()
    with without_garbage_collection(), _nothing_compiled():
        from qmixlora.demo import resolve
        from qmixlora.memory import card_at_hand, card_of, card_size

    parsed = resolve(parsed, None, Console(stderr=True))
    named = card or card_of(recipe or "")  # shipped recipes are named after theirs
    at_hand = card_at_hand()
    size = card_size(named, vram) or at_hand
    shown = _planned(parsed, size, tokens, None if size == at_hand else at_hand, probing)
    if as_json:
        print_json(shown)
        return
    console = Console(highlight=False)
    console.width = min(console.width, 80)  # lines of a size that is read at a glance
    _show(shown, console)
    if recipe is not None and model is None and shown["fits"] is not False:
        say_next(console, "train", recipe, *(overrides or []))


def _recipe(recipe: str | None, overrides: list[str], model: str | None) -> Recipe:
    """The recipe that is named, or the default one for a model."""
    if model is not None and recipe is not None and "=" in recipe:  # the default recipe has overrides too
        overrides, recipe = [recipe, *overrides], None
    if recipe is not None and model is None:
        return load_recipe(recipe, overrides)
    if recipe is not None or model is None:
        raise UserError("Name a recipe, or a model with --model.", where="command line")
    from qmixlora.memory.simulation.batch import MODEL_ALONE

    return edited(validate({"model": {"id": model}, "data": {"train": MODEL_ALONE}}, f"--model {model}"), overrides)


def _planned(
    recipe: Recipe, card: int | None, tokens: int | None, at_hand: int | None, probing: bool
) -> dict[str, Any]:
    """The plan as JSON, with progress on a terminal. `at_hand` is a card beside the one that is planned for."""
    from qmixlora.device import GIB
    from qmixlora.memory import plan_with_advice, room_on
    from qmixlora.progress import progress

    with progress("planning") as tell, without_garbage_collection():
        advice = plan_with_advice(recipe, card=card, tokens=tokens, on_progress=tell)
    told = advice.to_dict()
    if at_hand is not None:
        told["at_hand"] = {"card_gib": at_hand / GIB, "fits": advice.plan.peak_with_loading <= room_on(at_hand)}
    if probing:
        from qmixlora.training.probe import probe

        told["probe"] = probe(recipe, advice.plan).to_dict()
    return told


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """bitsandbytes has four of its functions compiled when it is imported, for which torch imports its compiler: a
    second or more, for functions that compute the same without.
    """
    import torch

    compile = torch.compile
    torch.compile = lambda function=None, **options: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile


def _show(plan: dict[str, Any], console: Console) -> None:
    _show_batch(plan["batch"], console)
    _show_parts(plan, console)
    _show_card(plan, console)
    _show_evaluation(plan["evaluation"], console)
    if probed := plan.get("probe"):
        console.print(
            f"Probe on {probed['device']}, tensors: planned {_size(probed['planned_gib'])}, "
            f"measured {_size(probed['measured_gib'])} ({probed['residual_gib'] / probed['measured_gib']:+.1%})."
        )
    if plan["advice"]:
        console.print("Edits, each alone:")
    for edit in plan["advice"]:
        enough = ", and then it fits" if edit.get("fits") and not plan["fits"] else ""
        _show_edit(edit["edit"], console)
        console.print(f"    saves {_size(edit['saves_gib'])}{enough}")
    for one in plan["smallest"]:
        _show_set(one, console)
    if plan["fits"] is False and not plan["smallest"]:
        console.print("No set of edits was found with which it fits.")


def _show_batch(batch: dict[str, Any], console: Console) -> None:
    size = f"{batch['samples']} x {batch['tokens']} tokens"
    console.print(f"One training step on {size}, at most {batch['image_tokens']} of a sample from images")
    console.print(f"({batch['source']}).", markup=False)
    if batch["unmeasured"] is not None:
        console.print(f"[yellow]The data was not measured:[/yellow] {escape(batch['unmeasured'])}")


def _show_parts(plan: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("size", justify="right")
    for name, size in plan["parts"].items():
        table.add_row(name, _size(size))
    table.add_section()
    table.add_row("[bold]peak", f"[bold]{_size(plan['peak_gib'])}")
    console.print(table)
    console.print(f"Reached in: {plan['place']}.")
    for name, where in (("host", "Meanwhile in host memory"), ("loading", "While loading")):
        sizes = ", ".join(f"{part} {_size(size)}" for part, size in plan[name].items() if size >= 0.0005)
        if sizes:
            console.print(f"{where}: {sizes}.")


def _show_card(plan: dict[str, Any], console: Console) -> None:
    if "at_hand" in plan:
        there = plan["at_hand"]
        console.print(f"The GPU at hand has {_size(there['card_gib'])} free: it {_verdict(there['fits'])} there.")
    if plan["card_gib"] is None:
        return
    left = plan["card_gib"] - max(plan["peak_gib"], plan["loading"]["card"])
    wanted = plan["needed_margin_gib"]
    how = f"{_size(left)} left" if plan["fits"] else f"{_size(wanted - left)} too much"
    console.print(
        f"It {_verdict(plan['fits'])} a card with {_size(plan['card_gib'])} for programs: {how}, "
        f"{_size(wanted)} are to stay free."
    )
    samples, tokens = plan["largest"]["micro_batch_size"], plan["largest"]["tokens"]
    if samples and tokens:
        console.print(f"Largest that fits: micro-batch {samples}, or samples of {tokens} tokens.")


def _show_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    sizes = {
        "validation loss": evaluation["validation_gib"],
        "answers in the run": evaluation["generation_in_run_gib"],
        "answers by generation": evaluation["generation_gib"],
    }
    told = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items() if size is not None)
    console.print(f"Evaluating {evaluation['samples']} at a time (train.eval_batch_size): {told}.")
    if evaluation["fits"] is False:
        fewer = evaluation["samples_that_fit"]
        how = f"train.eval_batch_size={fewer} does" if fewer else "nor does one sample"
        console.print(f"  That [bold red]does not fit[/bold red]; {how}.")


def _show_set(one: dict[str, Any], console: Console) -> None:
    same = "; what is learned stays the same" if one["learns_the_same"] else ""
    console.print(f"Together, and then it fits with {_size(one['margin_gib'])} left{same}:")
    _show_edit(one["edit"], console)


def _show_edit(edit: str, console: Console) -> None:
    """An edit to be pasted into a command, on one line where it fits."""
    lines = edit if len(edit) < 78 else edit.replace(" ", " \\\n  ")
    console.print(f"  {lines}", markup=False, soft_wrap=True)


def _verdict(fits: bool) -> str:
    return "[green]fits[/green]" if fits else "[bold red]does not fit[/bold red]"


def _size(gib: float) -> str:
    from qmixlora.device import GIB, in_words

    return in_words(gib * GIB)
