"""The tokens that stand for an image in a prompt: found by asking the same question with and without one."""

from __future__ import annotations

from collections import Counter

from qmixlora.data.formats import question_about
from qmixlora.data.images.opening import blank_image
from qmixlora.errors import UserError

from .collate import Collator

SIZES = ((224, 224), (2000, 500), (500, 2000), (1600, 1600))  # width, height: of one tile, and of several


def image_tokens_of(collator: Collator) -> tuple[list[int], list[int]]:
    """(image tokens, breaks): the special tokens that an image brings into a question, its placeholders and all marks
    around and between its parts; and the ordinary tokens that it brings, such as line breaks after rows of tiles.

    Empty for a model whose processor or template refuses the question.
    """
    special = set(collator.processor.tokenizer.added_tokens_decoder)
    try:
        without = Counter(collator.tokens(question_about([], "?")["turns"][:-1], prompt=True))
        brought: Counter[int] = Counter()
        for size in SIZES:
            asked = collator.prompts([question_about([blank_image(size)], "?")])
            brought |= Counter(asked["input_ids"][0].tolist()) - without
    except (UserError, ValueError):
        return [], []
    marks = {token for token in brought if token in special and token not in without}
    return sorted(marks), sorted(set(brought) - marks)
