"""Right and wrong answers with their pictures, as many as a page can hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from qmixlora.data import locate, open_images
from qmixlora.errors import UserError, some
from qmixlora.evaluation import Prediction
from qmixlora.webpage import picture

RIGHT = 0.5  # scores below it are of wrong answers
SHOWN = 12  # answers of each kind
SIDE = 240  # pixels of a picture's longer side
LONGEST = 600  # characters of a text


def answers_section(predictions: Sequence[Prediction], shown: int = SHOWN) -> str:
    """Answers to look at: wrong ones first, then right ones, each kind from all tasks in turn."""
    wrong = in_turn([one for one in predictions if one.score < RIGHT])
    right = in_turn([one for one in predictions if one.score >= RIGHT])
    parts = ["<h2>Answers</h2>"]
    for kind, title, chosen in (("act", "Wrong", wrong), ("good", "Right", right)):
        if chosen:
            cards = "".join(_card(one, kind) for one in chosen[:shown])
            parts.append(f'<h3>{title}: {len(chosen)} of {len(predictions)}</h3><div class="grid">{cards}</div>')
    return "".join(parts)


def in_turn(predictions: Iterable[Prediction]) -> list[Prediction]:
    """The predictions with their tasks taking turns, each in the order of its rows."""
    of_task: dict[str, list[Prediction]] = {}
    for one in predictions:
        of_task.setdefault(one.task, []).append(one)
    ranked = [(rank, place, one) for place, own in enumerate(of_task.values()) for rank, one in enumerate(own)]
    return [one for _, _, one in sorted(ranked, key=lambda item: item[:2])]


def _card(one: Prediction, kind: str) -> str:
    expected, said = " | ".join(dict.fromkeys(one.references)), "said (cut)" if one.cut else "said"
    return (
        f'<article><div class="quiet">{escape(_cut(one.task))}, row {one.row}</div>{_pictures(one.images)}'
        f'<div class="turn">{escape(_cut(one.question))}</div>'
        f'<div class="turn {kind}"><b>{said}</b> {escape(_cut(one.answer.strip())) or "nothing"}</div>'
        f'<div class="turn"><b>expected</b> {escape(_cut(expected))}</div></article>'
    )


def _pictures(paths: Sequence[str | None]) -> str:
    """The first picture of a row, and what there is to say of it."""
    if not paths:
        return ""
    caption = escape(some([Path(path).name if path else "picture inside the data" for path in paths], 1))
    if paths[0] is None:
        return f'<div class="quiet">{caption}</div>'
    try:
        [image] = open_images([locate(paths[0], Path(), "predictions.jsonl")])
    except UserError as error:
        return f'<div class="quiet">{escape(paths[0])}: {escape(error.what)}</div>'
    return f"<figure>{picture(image, SIDE, 80)}<figcaption>{caption}</figcaption></figure>"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
