"""The keys of rows and turns that are read, where a recipe does not name them."""

from __future__ import annotations

DIALOGUES = ("conversations", "messages")
KEYS = ("from", "value"), ("role", "content")  # of a turn: who speaks, and what
IMAGE_FIELDS = ("image", "images")  # of a dialogue; in a table the recipe names the columns
TASK_FIELDS = ("task", "task_name")
SYSTEM_FIELDS = ("system", "system_prompt")
