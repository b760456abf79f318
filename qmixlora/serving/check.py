"""A check of an export where it is served: whether the export answers, the base without it, or something else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from qmixlora.errors import CheckError

from .comparison import TOLERANCES, Difference, difference, differences, nearest
from .fingerprint import BASE, EXPORT, NO_PROJECTOR, ORIGINAL, Answer, Fingerprint, Message, Prompt

Verdict = Literal["applied", "not applied", "something else"]
NAMES = {
    EXPORT: "the export",
    BASE: "the base without it",
    ORIGINAL: "the base without it, before its projector was trained",
    NO_PROJECTOR: "the export without its projector",
}
FEW = "Without log-probabilities of the server, answers alone are compared."
BLIND = "The server takes no images: prompts without any were asked alone."
NEARER = 10  # times nearer than the export: whose answers they are, by a server that is further off than rounding
APART = 3  # times further off than what rounding explains: not of the same cause
CLOSE = "The export and its base are too near each other on these prompts to be told apart."


class Asked(Protocol):
    """A model somewhere that answers; `sees` says whether it takes images."""

    @property
    def sees(self) -> bool: ...

    def answer(self, messages: list[Message], max_tokens: int) -> Answer: ...

    def answer_of_base(self, messages: list[Message], max_tokens: int) -> Answer | None: ...


@dataclass(frozen=True)
class Report:
    """What answered: the verdict, its reasons, and how far the answers are from those in the fingerprint."""

    verdict: Verdict
    reasons: tuple[str, ...]
    found: Mapping[str, Difference]
    tolerance: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it; null for a difference that is no number, which JSON has not."""
        numbers = {
            whose: {
                "same": one.same,
                "mean_difference": _finite(one.mean),
                "largest_difference": _finite(one.largest),
            }
            for whose, one in self.found.items()
        }
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "prompts": self.found[EXPORT].prompts,
            "tolerance": _finite(self.tolerance),
            "against": numbers,
            "notes": list(self.notes),
        }


def check(fingerprint: Fingerprint, asked: Asked, tolerance: float | None = None) -> Report:
    """Ask the fingerprint's prompts and say whose the answers are.

    `tolerance` is the mean difference of log-probabilities that rounding explains, by default as the fingerprint's
    dtype has it. Raises CheckError where there is no prompt that can be asked, or the server refuses.
    """
    limit = TOLERANCES[fingerprint.dtype] if tolerance is None else tolerance
    prompts = [prompt for prompt in fingerprint.prompts if asked.sees or not prompt.has_image]
    if not prompts:
        raise CheckError("The server takes no images, and all prompts of the fingerprint have one.", where=str(asked))
    answers = [asked.answer(prompt.messages, fingerprint.max_tokens) for prompt in prompts]
    found, notes = differences(answers, prompts), _notes(asked, answers, prompts, limit)
    whose = nearest(found)
    if found[EXPORT].mean <= limit and whose == EXPORT:
        return Report("applied", (), found, limit, notes)
    if found[whose].mean <= limit:
        verdict: Verdict = "not applied" if whose in (BASE, ORIGINAL) else "something else"
        return Report(verdict, (f"It answers as {NAMES[whose]}.",), found, limit, notes)
    reasons = _lengths(answers, prompts) or _most_like(whose, found) or _parts(answers, prompts, limit)
    if not reasons:
        asked_of_base = (asked.answer_of_base(prompt.messages, fingerprint.max_tokens) for prompt in prompts)
        of_base = [answer for answer in asked_of_base if answer is not None]
        is_known = len(of_base) == len(prompts)
        reasons = _of_base(of_base, prompts, found, limit) if is_known else _without_base(answers)
    return Report("something else", tuple(reasons), found, limit, notes)


def _notes(asked: Asked, answers: Sequence[Answer], prompts: Sequence[Prompt], limit: float) -> tuple[str, ...]:
    own, base = ([prompt.answers[whose] for prompt in prompts] for whose in (EXPORT, BASE))
    is_close = difference(own, base).mean <= 2 * limit
    said = {FEW: not all(answer.steps for answer in answers), BLIND: not asked.sees, CLOSE: is_close}
    return tuple(note for note, holds in said.items() if holds)


def _lengths(answers: Sequence[Answer], prompts: Sequence[Prompt]) -> list[str]:
    """What other lengths of the prompts say; nothing where the server does not tell them, or they are right."""
    pairs = [(answer.prompt_tokens, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
    other = [(count, p) for count, p in pairs if count is not None and count != p.answers[EXPORT].prompt_tokens]
    if not other:
        return []
    count, prompt = other[0]
    lengths = f"{len(other)} of {len(prompts)} prompts have another length in tokens, such as {count} instead of"
    lengths += f" {prompt.answers[EXPORT].prompt_tokens}"
    if any(not prompt.has_image for _, prompt in other):
        return [f"Another chat template or tokenizer: {lengths}."]
    return [f"Images of another size: {lengths}; those without an image are right."]


def _most_like(whose: str, found: Mapping[str, Difference]) -> list[str]:
    """Whose answers it has, where a server is further off than rounding, as some are with images."""
    is_clear = whose != EXPORT and NEARER * found[whose].mean <= found[EXPORT].mean
    return [f"It answers most like {NAMES[whose]}."] if is_clear else []


def _parts(answers: Sequence[Answer], prompts: Sequence[Prompt], limit: float) -> list[str]:
    """What it says that prompts without an image are answered as they should be, and those with one are clearly not."""
    pairs = list(zip(answers, prompts, strict=True))
    plain, seen = (_off([pair for pair in pairs if pair[1].has_image is has]) for has in (False, True))
    if plain is None or seen is None or plain > limit or seen < APART * plain:
        return []
    return ["Without an image it answers as the export: images are prepared otherwise, or the projector is another."]


def _without_base(answers: Sequence[Answer]) -> list[str]:
    """What is left where the base cannot be asked."""
    if any(answer.prompt_tokens is None for answer in answers):
        return ["Another base, chat template, size of images or scale (alpha): the server tells no lengths of prompts."]
    return ["Prompts have the right lengths: another base, chat template or scale (alpha), or other numbers."]


def _of_base(
    answers: Sequence[Answer], prompts: Sequence[Prompt], found: Mapping[str, Difference], limit: float
) -> list[str]:
    """What the server's base says about what is wrong with the adapter on it."""
    off = difference(answers, [prompt.answers[BASE] for prompt in prompts]).mean
    if off > limit:
        return ["The base below the adapter is another one (or has another chat template, or is in fewer bits)."]
    if off > found[EXPORT].mean / APART:  # within what rounding explains, and yet no smaller by much
        return ["The base is nearly as far off as the adapter on it: it is in fewer bits, or rounds otherwise."]
    return ["The base is the right one: the adapter is applied at another scale (alpha), or a part of it is."]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _off(pairs: Sequence[tuple[Answer, Prompt]]) -> float | None:
    """The mean difference from the export's answers; None where nothing was asked."""
    return difference([one for one, _ in pairs], [p.answers[EXPORT] for _, p in pairs]).mean if pairs else None
