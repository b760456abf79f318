"""Whether the answers of some rows are as short as those that are generated have to be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from qmixlora.data.rendering.collate import Collator

DRAWN = 10_000  # different answers that are looked at: enough to tell, and as many as take a moment


def too_long_to_generate(by_task: Iterable[Counter[str]], collator: Collator, limit: int) -> str | None:
    """What to say of answers that have, with the token that ends them, more tokens than are generated
    (`train.max_new_tokens`), and so are cut before they are scored; None where none has. Of each task: how often each
    answer comes.
    """
    counts = sum(by_task, Counter[str]())
    looked_at = sorted(counts) if len(counts) <= DRAWN else random.Random(0).sample(sorted(counts), DRAWN)
    lengths = generated_lengths(looked_at, collator, limit)
    long = {text: length for text, length in lengths.items() if length > limit}
    if not long:
        return None
    count, of = sum(counts[text] for text in long), sum(counts[text] for text in looked_at)
    return (
        f"{count} of {of} answers are longer than what is generated (train.max_new_tokens: {limit}), so that even a "
        f"right one is cut and scored as it is; set train.max_new_tokens: {max(long.values())}, the longest one's."
    )


def generated_lengths(texts: Iterable[str], collator: Collator, least: int = 0) -> dict[str, int]:
    """The tokens of answers, each with the one that ends it; left out are those that cannot have more than `least`."""
    some = [text for text in texts if len(text.encode(errors="replace")) >= least]  # a token is one byte at least
    if not some:
        return {}
    tokens = collator.processor.tokenizer(some, add_special_tokens=False)["input_ids"]
    return {text: len(own) + 1 for text, own in zip(some, tokens, strict=True)}
