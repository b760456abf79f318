"""What exact match compares."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmixlora.evaluation import normalize


def test_case_blanks_and_a_full_stop_do_not_count() -> None:
    assert normalize("  Top   left. ") == normalize("top left")


def test_the_order_of_words_counts() -> None:
    assert normalize("top left") != normalize("left top")


def test_a_number_and_its_word_are_not_the_same() -> None:
    assert normalize("7") != normalize("seven")


@given(st.text(alphabet=" .aB\tß\u00a0\u3000"))
def test_normalising_twice_is_normalising_once(answer: str) -> None:
    assert normalize(normalize(answer)) == normalize(answer)
