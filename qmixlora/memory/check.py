"""Check that a recipe that is named after a card fits it, and that the head of its file says so truly."""

from __future__ import annotations

import re

from qmixlora.device import GIB
from qmixlora.errors import CheckError, typed
from qmixlora.recipe import Recipe, recipe_name

from .cards import CARDS, card_bytes
from .planner import MARGIN, Plan, plan

TOLERANCE = 0.02  # of the peak: so much do releases of torch and transformers differ in the allocator's gaps
STATED = re.compile(r"^# .*Predicted peak: ([\d.]+) GiB", re.MULTILINE)


def card_of(name: str) -> str | None:
    """The card in the name of a recipe or its file (`MODEL-CARD`), if there is one."""
    return next((card for card in CARDS if recipe_name(name).endswith(f"-{card}")), None)


def check_fit(name: str, text: str, recipe: Recipe) -> Plan:
    """Plan a recipe on the card of its name.

    Raises:
        CheckError: it takes more than the card less 8 %, or another peak (2 % off) than the head of its
            file says.
    """
    card = card_of(name)
    assert card is not None
    planned = plan(recipe, card=card_bytes(card))
    peak = planned.peak_with_loading / GIB
    if not planned.fits:
        raise CheckError(
            f"The planned peak, {peak:.1f} GiB, leaves less than {MARGIN:.0%} of the {CARDS[card]} GiB free.",
            where=name,
            fix=f"`{typed('plan', name, '--card', card)}` says what to change.",
        )
    stated = STATED.search(text)
    if stated is None or abs(float(stated[1]) - peak) > TOLERANCE * peak:
        said = f"{stated[1]} GiB" if stated else "nothing"
        raise CheckError(f"The file predicts {said}, the plan {peak:.1f} GiB.", where=name, fix="Correct its head.")
    return planned
