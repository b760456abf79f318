"""A page about a data set: one HTML file with everything in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from qmixlora.data import open_images
from qmixlora.data.checking.facts import SplitFacts
from qmixlora.webpage import picture, table, write_html

from .dataset import Described
from .shown import ShownImage, ShownSample

SIDE = 320  # pixels of the longer side of an image on the page


def write_page(path: Path, described: Described, samples: Sequence[ShownSample]) -> None:
    """Write the page. Raises UserError if an image of a sample cannot be decoded."""
    facts = described.facts
    parts = ["<h1>Data</h1>", _table(facts.splits)]
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in facts.warnings]
    parts += [_about(split) for split in facts.splits]
    parts += ["<h2>Samples</h2>" * bool(samples), *map(_sample, samples)]
    write_html(path, "Data", parts)


def _table(splits: Sequence[SplitFacts]) -> str:
    names = ("split", "samples", "left out", "tokens: median", "p99", "largest", "of images", "padding", "twice")
    rows = []
    for split in splits:
        tokens = [f"{value:.0f}" for value in split.tokens.values()] if split.tokens else ["-"] * 4
        padding = f"{split.padding.shuffled:.0%}" if split.padding else "-"
        rows.append([split.split, str(split.samples), str(split.left_out), *tokens, padding, str(split.duplicates)])
    return table(names, rows)


def _about(split: SplitFacts) -> str:
    """The tasks of a split with their most frequent answers, and what was left out."""
    rows = []
    for task, count in split.tasks.items():
        answers = split.answers[task]
        common = ", ".join(f"{text[:80]!r} {share:.0%}" for text, share in answers.shares.items())
        rows.append([task, str(count), str(answers.different), common])
    refused = "".join(
        f'<p class="refused">{escape(what)}<br><span class="quiet">{escape(where)}</span></p>'
        for where, what in split.refusals
    )
    more = split.left_out - len(split.refusals)
    told = table(("task", "samples", "answers", "most frequent"), rows, left=[3])
    return f"<h2>{split.split}</h2>{told}{refused}" + f"<p>and {more} more</p>" * (more > 0)


def _sample(sample: ShownSample) -> str:
    images = "".join(map(_figure, sample.images))
    turns = "".join(
        f'<div class="turn {turn["role"]}"><b>{turn["role"]}</b> {escape(turn["text"])}</div>' for turn in sample.turns
    )
    head = f'<span class="quiet">{sample.split} {sample.index}, task {escape(sample.task)}</span>'
    return f"<article>{head}<div>{images}</div>{turns}</article>"


def _figure(image: ShownImage) -> str:
    [seen] = open_images([image.file])
    caption = f"{escape(image.name)}<br>{image.width} x {image.height}"
    return f"<figure>{picture(seen, SIDE)}<figcaption>{caption}</figcaption></figure>"
