"""qmixlora data"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from . import here
from .ending import say_next
from .output import print_json

LONGEST = 80  # characters of an answer that are shown


def data(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as data.train=rows.jsonl.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="So many samples of every split, with their images.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write everything into one HTML file, its images too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
) -> None:
    """What a recipe's data holds, every row looked at; exits 1 if a run could not use some of it."""
    from qmixlora.recipe import load_recipe

    if html is not None:
        here.new_file(html, "--html")
    parsed = load_recipe(recipe, overrides or [])
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.inspection.dataset import describe
    from qmixlora.inspection.page import write_page
    from qmixlora.inspection.shown import samples_of

    described = describe(resolve(parsed, None, Console(stderr=True)))
    samples = samples_of(described.data, show or (3 if html else 0))
    shown = [sample.to_dict() for sample in samples]
    if html is not None:
        write_page(html, described, samples)
    if as_json:
        print_json({**described.to_dict(), "shown": shown})
    else:
        console = Console(highlight=False)
        _show(described.to_dict(), console)
        _show_samples(shown, console)
        if html is not None:
            console.print(f"Page: {html}", markup=False, soft_wrap=True)
        unusable = described.facts.left_out > 0 and parsed.data.on_bad_sample != "skip"
        skip, to = (["data.on_bad_sample=skip"], "or fix the rows above") if unusable else ([], "")
        say_next(console, "plan", recipe, *(overrides or []), *skip, to=to)
    raise SystemExit(int(described.facts.left_out > 0))


def _show(facts: dict[str, Any], console: Console) -> None:
    table = Table(
        Column("split", no_wrap=True), "samples", "left out", "twice", "tokens: median", "p99", "most", "of images"
    )
    for split in facts["splits"]:
        tokens = split["tokens"] or {}
        sizes = [f"{tokens[name]:.0f}" if tokens else "-" for name in ("median", "p99", "largest", "largest_of_images")]
        table.add_row(split["split"], str(split["samples"]), str(split["left_out"]), str(split["duplicates"]), *sizes)
    console.print(table)
    for split in facts["splits"]:
        _show_split(split, console)
    for warning in facts["warnings"]:
        console.print(warning, style="yellow", markup=False, soft_wrap=True)
    for note in facts["template"]:
        console.print(escape(note))


def _show_split(split: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{split['split']}[/bold]")
    for task, count in split["tasks"].items():
        answers = split["answers"][task]
        common = ", ".join(f"{text[:LONGEST]!r} {share:.0%}" for text, share in answers["shares"].items())
        console.print(
            f"  {task}: {count} samples, {answers['different']} answers: {common}", markup=False, soft_wrap=True
        )
    images = ", ".join(f"{count} with {number}" for number, count in split["images"].items())
    console.print(f"  images: {images}")
    if padding := split["padding"]:
        console.print(
            f"  padding in batches of {padding['batch_size']}: {padding['shuffled']:.0%} of all tokens; "
            f"{padding['by_step']:.0%} with data.group_by_length=step, {padding['by_length']:.0%} with true"
        )
        if padding["batch_tokens"]:
            console.print(
                f"  padding in batches of {padding['batch_tokens']} tokens (train.batch_tokens): "
                f"{padding['by_tokens']:.0%}; {padding['samples_by_tokens']:.1f} samples in one on average"
            )
    for reason, count in split["reasons"].items() if split["left_out"] > len(split["refusals"]) else ():
        console.print(f"  {count} x {reason}", style="red", markup=False, soft_wrap=True)
    for where, what in split["refusals"]:
        console.print(f"  [red]{escape(where)}[/red]: {escape(what)}", soft_wrap=True)
    if split["left_out"] > len(split["refusals"]):
        console.print(f"  and {split['left_out'] - len(split['refusals'])} more")


def _show_samples(samples: Sequence[dict[str, Any]], console: Console) -> None:
    for sample in samples:
        console.print(f"\n[bold]{sample['split']} {sample['index']}[/bold], task {escape(sample['task'])}")
        for image in sample["images"]:
            console.print(f"  {image['name']} ({image['width']} x {image['height']})", markup=False, soft_wrap=True)
        for turn in sample["turns"]:
            text = escape(turn["text"]).replace("\n", "\n    ")
            console.print(f"  [bold]{turn['role']}[/bold] {text}", soft_wrap=True)
