"""Talking to a run: its conversations, who answers, and what works meanwhile. `web` (with gradio) is imported alone."""

from .dialogue import Dialogue
from .lines import Chat
from .speakers import Speakers, factors_at_work, opened_exports

__all__ = ["Chat", "Dialogue", "Speakers", "factors_at_work", "opened_exports"]
