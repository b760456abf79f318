"""One wording for what means the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmixlora.evaluation.wording import normalize, quantities_in, vqa_wording, whole_words, words


def test_case_blanks_and_a_full_stop_do_not_count() -> None:
    assert normalize("  Top   left. ") == normalize("top left")


def test_the_order_of_words_counts() -> None:
    assert normalize("top left") != normalize("left top")


def test_a_number_and_its_word_are_not_the_same_for_exact_match() -> None:
    assert normalize("7") != normalize("seven")


@given(st.text(alphabet=" .aB\tß\u00a0\u3000e\u0301\u0345İǰ"))
def test_normalising_twice_is_normalising_once(answer: str) -> None:
    assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize(
    ("said", "wording"),
    [
        ("A  dog!", "dog"),
        ("the man's hat", "mans hat"),
        ("3.5", "3.5"),
        ("one, two", "1 2"),
        ("2,000", "2000"),
        ("yes/no", "yes no"),
        ("Ja.", "ja"),
    ],
)
def test_the_wording_of_the_vqa_challenge_leaves_out_what_does_not_count(said: str, wording: str) -> None:
    assert vqa_wording(said) == wording


def test_characters_without_blanks_between_words_are_words() -> None:
    assert words("A 红色 bus", articles=False) == ["红", "色", "bus"]


def test_numbers_are_found_with_their_signs_and_thousands() -> None:
    assert quantities_in("-1,234.5 then .5 and 7%") == [[-1234.5], [0.5], [7]]
    assert quantities_in("3-5, or x-4") == [[3, 5], [4]]
    assert quantities_in("\u22125, 1/2, 10:30 and 2020-05-12") == [[-5], [1, 2], [10, 30], [2020, 5, 12]]
    assert quantities_in("2,5 of 1,234,567") == [[2, 5], [1234567]]
    assert quantities_in("two or three") == [[2], [3]]


@given(st.text())
def test_any_text_has_numbers_or_none(text: str) -> None:
    assert all(quantities_in(text))


def test_a_number_is_a_word() -> None:
    assert whole_words("It's 3.5kg, +12,000 or \u22125 at 9:30, the 3rd A12.") == [
        "it", "s", "3.5kg", "12000", "or", "-5", "at", "9:30", "the", "3rd", "a12",
    ]  # fmt: skip
