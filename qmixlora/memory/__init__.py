"""The planner: the memory that a run will take of a card, from its own training step on tensors without storage."""

from .advice import Advice, plan_with_advice, plan_worst
from .cards import CARDS, card_at_hand, card_bytes, card_size
from .check import card_of, check_fit
from .planner import Plan, plan, room_on

__all__ = [
    "CARDS",
    "Advice",
    "Plan",
    "card_at_hand",
    "card_bytes",
    "card_of",
    "card_size",
    "check_fit",
    "plan",
    "plan_with_advice",
    "plan_worst",
    "room_on",
]
