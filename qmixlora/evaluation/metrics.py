"""Metrics of generated answers: each gives every answer a score from 0 to 1 (CIDEr from 0 to 10), by its references.

An answer may have several references, all right; the best match counts, but for `vqa`, which counts how many agree.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from qmixlora.errors import UserError

from .choices import choice
from .wording import composed, normalize, quantities_in, vqa_wording, whole_words, words

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]  # answers, references of each -> scores
CLOSED_WORDS = 5  # a task most of whose references are longer is an open one


def exact(answer: str, references: Sequence[str]) -> float:
    """Whether an answer is a reference, but for case, blanks and a closing full stop."""
    return float(normalize(answer) in map(normalize, references))


def vqa(answer: str, references: Sequence[str]) -> float:
    """The VQA challenge's accuracy (Antol et al. 2015): min(1, agreeing annotators / 3), averaged over the sets that
    leave one annotator out. With fewer than four references, as many as are left have to agree in place of three; with
    one, it is equality.
    """
    said, given = vqa_wording(answer), [vqa_wording(reference) for reference in references]
    if len(given) == 1:
        return float(said == given[0])
    agreeing, needed = given.count(said), min(3, len(given) - 1)
    shares = [min(1.0, (agreeing - (reference == said)) / needed) for reference in given]
    return sum(shares) / len(shares)


def anls(answer: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity, 0 where it is below one half (Biten et al. 2019, ST-VQA and DocVQA)."""
    said, *given = (" ".join(composed(text).lower().split()) for text in (answer, *references))
    best = max(_similarity(said, reference) for reference in given)
    return best if best >= 0.5 else 0.0


def relaxed(answer: str, references: Sequence[str]) -> float:
    """Relaxed accuracy (Methani et al. 2020, ChartQA): numbers within 5 % of the reference, other answers exactly."""
    return max(float(_is_close(answer, reference, 0.05)) for reference in references)


def number(answer: str, references: Sequence[str], tolerance: float = 0.0) -> float:
    """Whether the last number of an answer is a reference's (`3.0` is 3, `1,200` is 1200, `three` is 3), up to a share
    of it; where a reference has several (`1/2`, `9:30`, `2 of 5`), whether the last ones are all of them. Where it has
    none: whether it has the same wording.
    """
    said = quantities_in(answer)
    for reference in references:
        right = [number for quantity in quantities_in(reference) for number in quantity]
        if not right and vqa_wording(answer) == vqa_wording(reference):
            return 1.0
        if right and _ends_in(said, right, tolerance):
            return 1.0
    return 0.0


def _ends_in(said: Sequence[Sequence[Decimal]], right: Sequence[Decimal], tolerance: float) -> bool:
    """Whether the last quantities, each of them whole, have these numbers."""
    last: list[Decimal] = []
    for quantity in reversed(said):
        if len(last) >= len(right):
            break
        last = [*quantity, *last]
    return len(last) == len(right) and all(
        one == other or abs(one - other) <= Decimal(str(tolerance)) * abs(other)
        for one, other in zip(last, right, strict=True)
    )


def contains(answer: str, references: Sequence[str]) -> float:
    """Whether the words of a reference stand together somewhere in the answer; a number is one word (`5` is not in
    `3.5`, nor `12` in `12,000`). A reference without a word (`+`) is looked for as it is written.
    """
    said = f" {' '.join(whole_words(answer))} "
    for reference in references:
        part = " ".join(whole_words(reference))
        if f" {part} " in said if part else composed(reference.strip()) in composed(answer):
            return 1.0
    return 0.0


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, articles left out (Rajpurkar et al. 2016, SQuAD)."""
    return max(_overlap(words(answer, articles=False), words(reference, articles=False)) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE-L), without stemming."""
    said = words(answer, articles=True)
    return max(_rouge(said, words(reference, articles=True)) for reference in references)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D (Vedantam et al. 2015) of a whole task, from pycocoevalcap; words as in `words`, without its Java
    tokenizer. From 0 to 10.

    Raises UserError where pycocoevalcap is not installed.
    """
    try:
        scorer = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    except ImportError:
        raise UserError(
            "CIDEr is pycocoevalcap's, which is not installed.",
            where="data.metrics",
            fix="pip install 'qmixlora[metrics]', or choose rouge_l.",
        ) from None
    texts = {index: [" ".join(words(answer, articles=True))] for index, answer in enumerate(answers)}
    right = {
        index: [" ".join(words(reference, articles=True)) for reference in own] for index, own in enumerate(references)
    }
    _, scores = scorer.compute_score(right, texts)
    return [float(score) for score in scores]


def _each(score: Callable[[str, Sequence[str]], float]) -> Metric:
    """The metric that scores every answer by itself."""

    def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return [score(answer, own) for answer, own in zip(answers, references, strict=True)]

    return scores


EACH = {
    "exact": exact, "vqa": vqa, "anls": anls, "relaxed": relaxed, "choice": choice, "contains": contains, "f1": f1,
    "rouge_l": rouge_l,
}  # fmt: skip


def metric_of(name: str, tolerance: float = 0.0) -> Metric:
    """A metric by the name that `data.metrics` gives it; `MODULE:FUNCTION` is one of the user's own, called with the
    answers and, for each, the list of its references, whose results are scores.

    Raises UserError where there is no such function; and a metric of the user's own where it gives no finite number for
    every answer.
    """
    if name in EACH:
        return _each(EACH[name])
    if name == "number":
        return _each(partial(number, tolerance=tolerance))
    return cider if name == "cider" else _own(name)


def _own(name: str) -> Metric:
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"There is no metric {name}: {error}.", where="data.metrics") from None

    def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        results = found(list(answers), [list(own) for own in references])
        try:
            given = [float(score) for score in results]
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} gave no list of scores: {error}.", where="data.metrics") from None
        if len(given) != len(answers):
            raise UserError(f"{name} gave {len(given)} scores for {len(answers)} answers.", where="data.metrics")
        for answer, score in zip(answers, given, strict=True):
            if not math.isfinite(score):
                raise UserError(
                    f"{name} gave {score} for the answer {answer!r}.",
                    where="data.metrics",
                    fix="A score is a finite number: have it give 0 for an answer that it cannot judge.",
                )
        return given

    return scores


def fitting_metric(references: Sequence[Sequence[str]]) -> str:
    """The metric of a task whose recipe names none: `vqa` where most answers have four references and more, `rouge_l`
    where most are longer than five words, else `exact`.
    """
    if 2 * sum(len(own) >= 4 for own in references) > len(references):
        return "vqa"
    long = sum(min(len(words(one, articles=True)) for one in own) > CLOSED_WORDS for own in references)
    return "rouge_l" if 2 * long > len(references) else "exact"


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1.0 if not longest else 1 - _distance(one, other) / longest


def _distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def _is_close(answer: str, reference: str, share: float) -> bool:
    said, right = _as_number(answer), _as_number(reference)
    if said is None or not right:
        return normalize(answer) == normalize(reference)
    return abs(said - right) <= share * abs(right)


def _as_number(text: str) -> float | None:
    """A text that is a number and nothing else; 5 % is 0.05."""
    text = text.strip().rstrip(".").replace(",", "")
    try:
        value = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _overlap(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    return _harmonic(sum((Counter(said) & Counter(right)).values()), len(said), len(right))


def _rouge(said: list[str], right: list[str]) -> float:
    row = [0] * (len(right) + 1)
    for word in said:
        above = 0
        for j, other in enumerate(right, start=1):
            above, row[j] = row[j], above + 1 if word == other else max(row[j], row[j - 1])
    return _harmonic(row[-1], len(said), len(right))


def _harmonic(shared: int, said: int, right: int) -> float:
    return 2 * shared / (said + right) if shared else 0.0
