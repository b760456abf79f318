"""Answers of a server beside those of a fingerprint: whose they are, and by how much they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .fingerprint import EXPORT, Answer, Prompt, Step

# a mean of differences of log-probabilities that rounding explains, by the dtype of the fingerprint
TOLERANCES = {"float64": 0.01, "float32": 0.01, "float16": 0.05, "bfloat16": 0.1}
PART = "\ufffd"  # what a part of a character decodes to
MISSING = 10.0  # the difference of a token that is not among the likeliest ones that a server tells


@dataclass(frozen=True)
class Difference:
    """Two models on some prompts: those with the same answer, and the differences of log-probabilities over the tokens
    up to the first that is another one (none where a server tells no log-probabilities).
    """

    prompts: int
    same: int
    logprobs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean difference; where there are no log-probabilities, infinite unless all answers are the same."""
        if self.logprobs:
            return sum(self.logprobs) / len(self.logprobs)
        return 0.0 if self.same == self.prompts else math.inf

    @property
    def largest(self) -> float | None:
        return max(self.logprobs, default=None)


def difference(observed: Sequence[Answer], expected: Sequence[Answer]) -> Difference:
    """How far answers are from the expected ones."""
    pairs = [(one, _told(one, other)) for one, other in zip(observed, expected, strict=True)]
    logprobs = [value for one, other in pairs for value in _logprobs(one, other)]
    return Difference(len(pairs), sum(_same(one, other) for one, other in pairs), tuple(logprobs))


def differences(observed: Sequence[Answer], prompts: Sequence[Prompt]) -> dict[str, Difference]:
    """How far a server's answers are from each of those in a fingerprint, by whose they are."""
    known = [whose for whose in prompts[0].answers if all(whose in prompt.answers for prompt in prompts)]
    return {whose: difference(observed, [prompt.answers[whose] for prompt in prompts]) for whose in known}


def nearest(found: Mapping[str, Difference]) -> str:
    """Whose answers are the nearest; the export's where others are as near."""
    return min(found, key=lambda whose: (found[whose].mean, whose != EXPORT))


def _told(observed: Answer, expected: Answer) -> Answer:
    """The expected answer as llama-server would tell it, if the observed one is of such a server, which tells tokens by
    id and text: without those that end within a character, which it tells with the token that completes it.
    """
    if not any(one.text and one.token is not None for one in observed.steps):
        return expected
    left, steps = list(expected.steps), []
    for one in observed.steps:
        near = enumerate(left[: _hidden(left) + 1])
        ahead = next((index for index, step in near if _is(one, step) and (not index or one.text != step.text)), 0)
        steps += left[ahead : ahead + 1]
        left = left[ahead + 1 :]
    return replace(expected, steps=(*steps, *left[_hidden(left) :]))


def _hidden(steps: Sequence[Step]) -> int:
    """How many steps from here on end within a character."""
    if not steps or not steps[0].text.endswith(PART):
        return 0
    return next((index for index, step in enumerate(steps) if step.text and not step.text.endswith(PART)), len(steps))


def _same(observed: Answer, expected: Answer) -> bool:
    """Whether all tokens are the same. A server may leave out the one that ends the answer, or not stop at it."""
    if not observed.steps:
        return observed.text.strip() == expected.text.strip()
    pairs = zip(observed.steps, expected.steps, strict=False)
    return len(observed.steps) >= len(expected.steps) - 1 and all(_is(one, other) for one, other in pairs)


def _logprobs(observed: Answer, expected: Answer) -> list[float]:
    """Differences at the tokens that were chosen for the same ones before them."""
    values = []
    for one, other in zip(observed.steps, expected.steps, strict=False):
        if one.logprob is None or other.logprob is None:
            break
        if not _is(one, other):
            found = one.others.get(other.text) if other.token is None else one.others.get(other.token)
            found = one.others.get(other.text) if found is None else found
            values.append(MISSING if found is None else abs(found - other.logprob))
            break
        values.append(abs(one.logprob - other.logprob))
    return values


def _is(one: Step, other: Step) -> bool:
    if one.token is not None and other.token is not None:
        return one.token == other.token
    return one.text == other.text
