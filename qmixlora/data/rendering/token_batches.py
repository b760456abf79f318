"""Samples of about one length together: in batches that are filled by tokens, padding included, or in a step's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def token_batches(lengths: Sequence[int], tokens: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Samples by number in batches of at most `tokens`, from the longest to the shortest; a sample that is longer alone
    has a batch of its own. Of one length, those come first that come first in `order`.

    How many batches there are depends on the lengths alone.
    """
    batches: list[list[int]] = []
    most = 0  # samples of the present batch's length that fit
    for index in sorted(range(len(lengths)) if order is None else order, key=lambda index: -lengths[index]):
        if not batches or len(batches[-1]) >= most:
            batches.append([])
            most = max(1, tokens // lengths[index])
        batches[-1].append(index)
    return batches


def longest_first(order: Sequence[int], step: int, lengths: Sequence[int]) -> Iterator[int]:
    """Samples by number in their order, `step` of them at a time from the longest to the shortest."""
    for start in range(0, len(order), step):
        yield from sorted(order[start : start + step], key=lambda index: -lengths[index])
