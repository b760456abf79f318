"""Whether answers hold special tokens of the model that are learned as letters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from qmixlora.data.rendering.template import ChatTemplate
from qmixlora.errors import some

EXAMPLES = 5  # tokens that are named


def learned_as_letters(by_task: Iterable[Counter[str]], template: ChatTemplate) -> str | None:
    """What to say of answers with special tokens that data may say, and that the recipe does not name; None where there
    are none. Of each task: how often each answer comes.
    """
    if not template.sayable:
        return None
    pattern = re.compile("|".join(map(re.escape, sorted(template.sayable, key=len, reverse=True))))
    tokens, count = Counter[str](), 0
    for counts in by_task:
        for answer, times in counts.items():
            own = set(pattern.findall(answer))
            tokens.update(dict.fromkeys(own, times))
            count += times if own else 0
    if not count:
        return None
    named = some([token for token, _ in tokens.most_common()], EXAMPLES)
    return (
        f"{count} answers hold special tokens of the model ({named}), which are learned as letters, as if they were "
        "quoted; where the model was trained to write them (around boxes, for example), name them in "
        "data.special_tokens."
    )
