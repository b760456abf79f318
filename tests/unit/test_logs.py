"""Logs of one JSON object per line: what a crash cut short is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.files import append_to_log, read_log


def test_a_log_reads_as_it_was_written(tmp_path: Path) -> None:
    for step in (1, 2):
        append_to_log(tmp_path / "run" / "log.jsonl", {"step": step, "text": "ä\n"})
    assert read_log(tmp_path / "run" / "log.jsonl") == [{"step": 1, "text": "ä\n"}, {"step": 2, "text": "ä\n"}]


@pytest.mark.parametrize(
    "cut", ['{"step": 2, "lo', "2", "\xff\xfe", ""], ids=["cut short", "a number", "no UTF-8", "empty"]
)
def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path, cut: str) -> None:
    (tmp_path / "log.jsonl").write_bytes(f'{{"step": 1}}\n{cut}\n{{"step": 3}}\n'.encode("latin-1"))
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 3}]


def test_a_record_never_ends_up_on_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    append_to_log(tmp_path / "log.jsonl", {"step": 2})
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_log_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []
