"""Pages for people: one HTML file each, with everything in it, for a phone, a screen or paper, light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from qmixlora.files import replacing

# Series in the colours of Okabe and Ito (2008), which people of any colour vision tell apart; lighter ones in the dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
IN_THE_DARK = ("#4da3d9", "#f0883e", "#2fc79c", "#e29bc2", "#f0b93a", "#86cbf2")
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2025; --quiet: #5b626c; --line: #d3d7dc; --card: #f5f6f8;
  --good: #d8efe6; --watch: #fbeecb; --act: #f9dcd3; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e6e8eb; --quiet: #a0a7b1; --line: #3a3f47;
  --card: #1d2026; --good: #12382c; --watch: #3e330f; --act: #47211a; DARK } }
@media print { :root { --paper: #fff; --ink: #000; --quiet: #444; --line: #bbb; --card: #fff;
  --good: #fff; --watch: #fff; --act: #fff; LIGHT } body { font-size: 10pt } article, figure, tr { break-inside: avoid }
  details:not([open])::details-content { content-visibility: visible; block-size: auto } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink); margin: 0 auto;
  max-width: 66rem; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } a { color: inherit }
h2 { border-top: 1px solid var(--line); padding-top: .8rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal;
  vertical-align: top }
td:first-child, th:first-child, .left { text-align: left } 
.wide { overflow-x: auto; max-width: 100%; background: /* a shadow at the side to which there is more */
  linear-gradient(90deg, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) 0 0 / .8rem 100% no-repeat,
  linear-gradient(270deg, var(--line), transparent) 100% 0 / .8rem 100% no-repeat }
.tall { max-height: 24rem; overflow-y: auto; border-bottom: 1px solid var(--line) } .tall table { margin-bottom: 0 }
@media print { .wide { background: none } .tall { max-height: none } }
@media (max-width: 30rem) { td, th { padding: .2em .4em; font-size: 13px } }
td.text { overflow-wrap: anywhere; text-align: left; min-width: 6rem }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.grid.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)) }
.grid > * { min-width: 0; margin: 0 } .chart svg { width: 100%; height: auto; display: block }
.chart { margin: 0 0 1rem; max-width: 34rem } .chart h3 { margin: .2rem 0 .4rem; font-size: 1rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7em 1em;
  margin: 1em 0 }
figure { margin: .4em 1em .4em 0; max-width: 320px; display: inline-block; vertical-align: top }
figure img { max-width: 100%; min-width: 6rem; height: auto; border: 1px solid var(--line) }
figcaption, .quiet { color: var(--quiet); font-size: 12px }
.turn { white-space: pre-wrap; margin: .3em 0 } .turn b { color: var(--quiet) }
.assistant, .good { background: var(--good) } .warning, .watch { background: var(--watch) }
.refused, .act { background: var(--act) } .good, .watch, .act, .warning, .refused, .assistant { padding: .4em .7em }
pre { background: var(--card); padding: .7em; overflow-x: auto; white-space: pre-wrap } summary { cursor: pointer }
"""


def write_html(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page whose body is these parts. What is no text (half a surrogate pair in a name) becomes `?`."""
    named = (f"--c{number}: {color};" for number, color in enumerate(COLORS))
    dark = (f"--c{number}: {color};" for number, color in enumerate(IN_THE_DARK))
    style = STYLE.replace("LIGHT", " ".join(named)).replace("DARK", " ".join(dark))
    html = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>' + escape(title) + "</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # a browser would ask a server for one
        f"<style>{style}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (), tall: bool = False) -> str:
    """A table of texts, which scrolls by itself where it is wider than the page (`tall`: or longer than a look at it).

    The first column stands left, as do those of `left`, which hold sentences.
    """

    def cells(kind: str, texts: Sequence[str]) -> str:
        named = (' class="text left"' if number in left else "" for number in range(len(texts)))
        return "".join(f"<{kind}{name}>{escape(text)}</{kind}>" for name, text in zip(named, texts, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "wide tall" if tall else "wide"
    return f'<div class="{kind}" tabindex="0"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def folded(summary: str, inside: str) -> str:
    """A part that opens at a click, and is open on paper."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def picture(image: Image.Image, side: int, quality: int = 85) -> str:
    """An image in the page itself, its longer side at most so many pixels."""
    seen = image.copy()
    seen.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    seen.save(file, "JPEG", quality=quality)
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{source}" width="{seen.width}" height="{seen.height}" alt="">'
