"""One row for every answer, for chat templates that leave out of earlier answers what was generated with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from qmixlora.data.formats import IMAGE

from .template import ChatTemplate


def one_answer_each(rows: Dataset, template: ChatTemplate) -> Dataset:
    """Rows of which each teaches all answers that the template lets it teach.

    With a template that keeps earlier answers as they are, these are the rows themselves. Else a conversation of
    several answers becomes one row for each of them, which ends with it, in the place of the conversation.
    """
    if template.is_append_only and template.keeps_thoughts:
        return rows

    def split(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        own = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        parts = [part for row in own for part in _parts(row, template)]
        return {name: [part[name] for part in parts] for name in batch}

    return rows.map(split, batched=True, features=rows.features, keep_in_memory=True, load_from_cache_file=False)


def _parts(row: dict[str, Any], template: ChatTemplate) -> Iterator[dict[str, Any]]:
    turns = row["turns"]
    ends = [index for index, turn in enumerate(turns, start=1) if turn["role"] == "assistant"]
    for index, following in zip(ends, [*ends[1:], None], strict=True):
        if following is not None and template.teaches_all(turns[:following]):
            continue  # the next part teaches all of this one
        if index == len(turns) and (len(ends) == 1 or template.teaches_all(turns)):
            yield row
            return
        asked = [earlier["text"] for earlier in turns[:index] if earlier["role"] != "assistant"]
        images, answers = sum(text.count(IMAGE) for text in asked), index - len(asked)
        first = 0 if template.teaches_all(turns[:index]) else answers - 1  # of the answers that this part teaches
        tasks, learned = (row.get("tasks") or [])[:answers], (row.get("learned") or [])[:answers]
        if learned and not any(learned[first:]):
            continue
        own = {"task": tasks[-1], "tasks": tasks[first:] if answers - first > 1 else []} if tasks else {}
        own |= {"learned": [] if all(learned[first:]) else learned[first:]}
        yield {**row, **own, "turns": turns[:index], "images": row["images"][:images]}
