"""Cards by name."""

from __future__ import annotations

import math

import pytest

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import CARDS, card_bytes, card_size


@pytest.mark.parametrize("name", CARDS)
def test_the_memory_on_a_cards_box_is_in_its_name(name: str) -> None:
    assert name.endswith(f"-{CARDS[name]}gb")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_planned_with_the_memory_that_its_driver_hands_out(name: str) -> None:
    assert 0.97 * CARDS[name] * GIB < card_bytes(name) < 0.985 * CARDS[name] * GIB


def test_an_unknown_card_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="Did you mean 'rtx3060-12gb'"):
        card_bytes("rtx3060")


@pytest.mark.parametrize("size", [math.inf, math.nan, 1e308])
def test_what_is_no_size_of_a_card_is_refused(size: float) -> None:
    with pytest.raises(UserError, match="No card has"):
        card_size(None, size)


def test_a_card_has_the_size_that_is_given_before_that_of_its_name() -> None:
    assert card_size("rtx3060-12gb", 0.5) == GIB // 2 and card_size(None, None) is None
    assert card_size("rtx3060-12gb", None) == card_bytes("rtx3060-12gb")
