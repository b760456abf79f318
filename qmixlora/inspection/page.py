"""A page about a data set: one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from qmixlora.data import open_images
from qmixlora.data.checking.facts import SplitFacts
from qmixlora.files import replacing

from .dataset import Described
from .shown import ShownImage, ShownSample

SIDE = 320  # pixels of the longer side of an image on the page
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .3em .8em; text-align: right }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd }
td:first-child, th:first-child, .left { text-align: left }
article { border: 1px solid #ddd; border-radius: 6px; margin: 1em 0; padding: .8em 1em; overflow-wrap: anywhere }
figure { display: inline-block; margin: .4em 1em .4em 0; max-width: 320px; vertical-align: top }
figure img { max-width: 100%; border: 1px solid #ddd } figcaption, .quiet { color: #666; font-size: 12px }
.turn { white-space: pre-wrap; margin: .3em 0 } .turn b { color: #555 }
.assistant { background: #eef7ee; padding: .2em .5em }
.warning { background: #fff4d6; padding: .5em .8em; margin: .4em 0 }
.refused { background: #fde8e6; padding: .5em .8em }
"""


def write_page(path: Path, described: Described, samples: Sequence[ShownSample]) -> None:
    """Write the page. Raises UserError if an image of a sample cannot be decoded."""
    facts = described.facts
    parts = ["<h1>Data</h1>", _table(facts.splits)]
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in facts.warnings]
    parts += [_about(split) for split in facts.splits]
    parts += ["<h2>Samples</h2>" * bool(samples), *map(_sample, samples)]
    html = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Data</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")


def _table(splits: Sequence[SplitFacts]) -> str:
    names = ("split", "samples", "left out", "tokens: median", "p99", "largest", "of images", "padding", "twice")
    rows = []
    for split in splits:
        tokens = [f"{value:.0f}" for value in split.tokens.values()] if split.tokens else ["-"] * 4
        padding = f"{split.padding.shuffled:.0%}" if split.padding else "-"
        rows.append([split.split, str(split.samples), str(split.left_out), *tokens, padding, str(split.duplicates)])
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _about(split: SplitFacts) -> str:
    """The tasks of a split with their most frequent answers, and what was left out."""
    lines = []
    for task, count in split.tasks.items():
        answers = split.answers[task]
        common = ", ".join(f"{escape(repr(text[:80]))} {share:.0%}" for text, share in answers.shares.items())
        lines.append(
            f"<tr><td>{escape(task)}</td><td>{count}</td><td>{answers.different}</td>"
            f'<td class="left">{common}</td></tr>'
        )
    refused = "".join(
        f'<p class="refused">{escape(what)}<br><span class="quiet">{escape(where)}</span></p>'
        for where, what in split.refusals
    )
    more = split.left_out - len(split.refusals)
    return (
        f"<h2>{split.split}</h2><table><tr><th>task</th><th>samples</th><th>answers</th>"
        f'<th class="left">most frequent</th></tr>{"".join(lines)}</table>{refused}'
        + f"<p>and {more} more</p>"
        * (more > 0)
    )


def _sample(sample: ShownSample) -> str:
    images = "".join(map(_figure, sample.images))
    turns = "".join(
        f'<div class="turn {turn["role"]}"><b>{turn["role"]}</b> {escape(turn["text"])}</div>' for turn in sample.turns
    )
    head = f'<span class="quiet">{sample.split} {sample.index}, task {escape(sample.task)}</span>'
    return f"<article>{head}<div>{images}</div>{turns}</article>"


def _figure(image: ShownImage) -> str:
    [seen] = open_images([image.file])
    seen.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    seen.save(file, "JPEG", quality=85)
    source = base64.b64encode(file.getvalue()).decode()
    caption = f"{escape(image.name)}<br>{image.width} x {image.height}"
    return f'<figure><img src="data:image/jpeg;base64,{source}" alt=""><figcaption>{caption}</figcaption></figure>'
