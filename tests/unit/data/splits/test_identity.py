"""What tells data apart."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.data import SCORED, fingerprint
from qmixlora.data.reading.store import in_memory

ROW: Any = {
    "turns": [{"role": role, "text": role} for role in ("user", "assistant") * 2],
    "images": [{"path": "folder/a.png", "bytes": None}],
    "task": "size",
    "tasks": ["color", "size"],
    "references": [],
    "learned": [],
    "origin": "here",
}


@pytest.mark.parametrize(
    "change",
    [
        {"turns": ROW["turns"][:2]},
        {"images": [{"path": "folder/b.png", "bytes": None}]},
        {"task": "shape"},
        {"tasks": ["digit", "size"]},
        {"learned": [False, True]},
    ],
)
def test_data_of_which_something_else_is_learned_is_another(change: dict[str, Any]) -> None:
    assert fingerprint(in_memory([ROW])) != fingerprint(in_memory([{**ROW, **change}]))


def test_data_that_was_moved_is_the_same() -> None:
    moved = {**ROW, "images": [{"path": "elsewhere/a.png", "bytes": None}], "origin": "there"}
    assert fingerprint(in_memory([ROW])) == fingerprint(in_memory([moved]))


def test_other_right_answers_are_other_scores_and_nothing_else_to_learn() -> None:
    rows, others = in_memory([ROW]), in_memory([{**ROW, "references": ["assistant", "aide"]}])
    assert fingerprint(rows, SCORED) != fingerprint(others, SCORED)
    assert fingerprint(rows) == fingerprint(others) == fingerprint(rows, SCORED)
