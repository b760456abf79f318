"""Consumer cards by name, with the memory that is printed on the box."""

from __future__ import annotations

import difflib

from qmixlora.device import GIB
from qmixlora.errors import UserError

CARDS = {  # GiB
    "rtx3050-8gb": 8,
    "rtx3060-12gb": 12,
    "rtx3070-8gb": 8,
    "rtx3080-10gb": 10,
    "rtx3090-24gb": 24,
    "rtx4060-8gb": 8,
    "rtx4060ti-16gb": 16,
    "rtx4070-12gb": 12,
    "rtx4080-16gb": 16,
    "rtx4090-24gb": 24,
    "rtx5060ti-16gb": 16,
    "rtx5070-12gb": 12,
    "rtx5080-16gb": 16,
    "rtx5090-32gb": 32,
}


def card_bytes(name: str) -> int:
    """The memory of a card in bytes. Raises UserError for a card that is not in the list."""
    if name not in CARDS:
        close = difflib.get_close_matches(name, CARDS, n=1, cutoff=0.4)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise UserError(
            f"There is no card {name!r} in the list.{meant}",
            where="--card",
            fix=f"Give its memory with --vram GB, or one of: {', '.join(CARDS)}.",
        )
    return CARDS[name] * GIB
