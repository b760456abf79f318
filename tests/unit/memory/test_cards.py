"""Cards by name."""

from __future__ import annotations

import pytest

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import CARDS, card_bytes


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_the_memory_that_is_in_its_name(name: str) -> None:
    assert name.endswith(f"-{card_bytes(name) // GIB}gb")


def test_an_unknown_card_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="Did you mean rtx3060-12gb"):
        card_bytes("rtx3060")
