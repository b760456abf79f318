"""Conversations with pictures: formats, loading, collating."""

from .collate import IGNORED, Collator, open_images
from .loading import load_conversations

__all__ = ["IGNORED", "Collator", "load_conversations", "open_images"]
