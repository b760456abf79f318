"""The planner: what a run will take of a card, from the run's own training step on tensors without storage."""

from .advice import plan_with_advice
from .cards import CARDS, GIB, card_bytes
from .planner import Plan, plan

__all__ = ["CARDS", "GIB", "Plan", "card_bytes", "plan", "plan_with_advice"]
