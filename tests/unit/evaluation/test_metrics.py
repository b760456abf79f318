"""Metrics by hand-made cases: each row is an answer, its references and the score by the metric's definition."""

from __future__ import annotations

import importlib.util
import sys
import types
import unicodedata

import pytest

from qmixlora.errors import UserError
from qmixlora.evaluation.metrics import fitting_metric, metric_of

TEN = ["dog"] * 3 + ["a dog"] + ["puppy"] * 2 + ["cat"] + ["animal"] * 3
CASES = [
    ("exact", " Top  Left. ", ["top left"], 1),
    ("exact", "left top", ["top left"], 0),
    ("exact", "fence", ["net", "Fence"], 1),
    ("vqa", "dog", TEN, 1),  # four of ten agree, "a dog" among them
    ("vqa", "puppy", TEN, 0.6),  # two agree: 2/3 without one of the other eight, 1/3 without one of the two
    ("vqa", "cat", TEN, 0.3),
    ("vqa", "The Animal!", TEN, 0.9),
    ("vqa", "two", ["2"], 1),
    ("vqa", "1,000", ["1000"], 1),
    ("vqa", "yes", ["yes", "no"], 0.5),
    ("vqa", "USA", ["U.S.A.", "America"], 0.5),
    ("vqa", "$5", ["5", "5"], 0),
    ("vqa", "ten t-shirts", ["10 t shirts"], 1),
    ("anls", "Coca Cola", ["coca-cola"], 8 / 9),
    ("anls", "pepsi", ["coca-cola"], 0),
    ("anls", "", ["x"], 0),
    ("relaxed", "104", ["100"], 1),
    ("relaxed", "106", ["100"], 0),
    ("relaxed", "5%", ["0.05"], 1),
    ("relaxed", "1,049", ["1000"], 1),
    ("relaxed", "Yes", ["yes"], 1),
    ("relaxed", "0.01", ["0"], 0),
    ("relaxed", "12", ["inf"], 0),
    ("choice", "B", ["b"], 1),
    ("choice", "(B) a cat", ["B"], 1),
    ("choice", "B. a cat", ["B. a cat"], 1),
    ("choice", "The answer is B.", ["B"], 1),
    ("choice", "Answer: B", ["B"], 1),
    ("choice", "**b**", ["B"], 1),
    ("choice", "the answer is b", ["B"], 1),
    ("choice", "B because of the fur", ["B"], 1),
    ("choice", "I think it is B", ["B"], 1),
    ("choice", "I think it is a cat", ["I"], 0),
    ("choice", "C. because A is wrong", ["A"], 0),
    ("choice", "A cat", ["B"], 0),  # an article, not a letter
    ("choice", "a cat", ["B. a cat"], 1),
    ("choice", "C", ["B"], 0),
    ("choice", "B", ["B. a cat"], 1),
    ("choice", "B because of the fur", ["B. a cat"], 1),
    ("choice", "B. because of the fur", ["B. a cat"], 1),
    ("choice", "The answer is B. A cat, surely.", ["B. a cat"], 1),
    ("choice", "B) a small cat", ["B) a cat"], 1),
    ("choice", "Answer: I think it is C", ["C"], 1),
    ("choice", "Answer: A because it is red", ["A"], 1),
    ("choice", "Option A is wrong, the answer is B", ["B"], 1),
    ("choice", "I looked at option A, but the answer is B", ["B"], 1),
    ("choice", "(a) is wrong; (b) is right", ["b"], 1),
    ("choice", "The answer is not A; it is B", ["B"], 1),
    ("choice", "E. faecalis", ["E. coli"], 0),  # an abbreviation, not a letter
    ("choice", "E. coli", ["E. coli"], 1),
    ("choice", "J. S. Bach", ["J. Brahms"], 0),
    ("choice", "The answer is J. Brahms", ["J. S. Bach"], 0),
    ("choice", "B cells", ["B. subtilis"], 0),
    ("choice", "C minor", ["C major"], 0),
    ("choice", "c major.", ["C major"], 1),
    ("choice", "T rex", ["T shirt"], 0),
    ("choice", "f(x) = 3", ["f(x) = 2"], 0),
    ("choice", "f(b) = 3", ["B"], 0),
    ("choice", "5 N", ["3 N"], 0),
    ("choice", "\\boxed{B}", ["B"], 1),
    ("choice", "So it is $\\boxed{\\text{(b)}}$.", ["B"], 1),
    ("choice", "The correct option is B because of the fur", ["B"], 1),
    ("choice", "The correct choice is B: a dog", ["B"], 1),
    ("choice", "The option is A, a dog", ["A"], 1),
    ("choice", "The option is a dog", ["A"], 0),
    ("choice", "The correct choice is A dog", ["A"], 0),
    ("choice", "It's B.", ["B"], 1),
    ("choice", "It\u2019s A.", ["A"], 1),
    ("choice", "It's a cat", ["A"], 0),
    ("choice", "It's not B", ["B"], 0),
    ("choice", "Choose B", ["B"], 1),
    ("choice", "I would pick A because it is red", ["A"], 1),
    ("choice", "I'd go with B", ["B"], 1),
    ("choice", "Choose A cat", ["A"], 0),
    ("choice", "Don't choose B", ["B"], 0),
    ("choice", "It cannot be option B", ["B"], 0),
    ("choice", "The answer can't be A. It must be B.", ["B"], 1),
    ("choice", "b) a cat", ["B"], 1),
    ("choice", "a) cat", ["A"], 1),
    ("choice", "b. a cat", ["B. a cat"], 1),
    ("choice", "b. a cat", ["B"], 1),
    ("choice", "b: a cat", ["B"], 1),
    ("choice", "b. a dog", ["B. a cat"], 0),
    ("choice", "e. faecalis", ["E. coli"], 0),
    ("choice", "a. m.", ["A"], 0),
    ("choice", "i. e. a cat", ["I"], 0),
    ("choice", "Ans: B", ["B"], 1),
    ("choice", "Ans. B", ["B"], 1),
    ("choice", "Hans B", ["B"], 0),
    ("choice", "The answer is A and not B", ["A"], 1),
    ("choice", "The answer is B, not A", ["B"], 1),
    ("choice", "The answer is A and not B", ["B"], 0),
    ("choice", "A is correct", ["A"], 1),
    ("choice", "A is the right answer", ["A"], 1),
    ("choice", "Option A is correct", ["A"], 1),
    ("choice", "答案是B", ["B"], 1),
    ("choice", "答案\uff1a\uff21。", ["A"], 1),
    ("choice", "答案不是B", ["B"], 0),
    ("choice", "\uff22", ["B"], 1),
    ("choice", "\uff08\uff22\uff09", ["\uff22"], 1),
    ("choice", "A, B, C, D", ["A"], 0),
    ("choice", "A or B", ["A"], 0),
    ("choice", "B and C", ["B"], 0),
    ("choice", "(B) and (C)", ["B"], 0),
    ("choice", "B, or maybe C", ["B"], 0),
    ("choice", "B/C", ["B"], 0),
    ("choice", "B、C", ["B"], 0),
    ("choice", "B and D are both correct", ["B"], 0),
    ("choice", "The answer is A or B", ["A"], 0),
    ("choice", "Of A, B and C, the answer is C", ["C"], 1),
    ("choice", "Between A and B, I choose B", ["B"], 1),
    ("choice", "B, I'm sure", ["B"], 1),
    ("choice", "B and I am sure", ["B"], 1),
    ("choice", "C, D would be wrong", ["C"], 1),
    ("choice", "The answer is B and C is wrong", ["B"], 1),
    ("choice", "The answer is T-shirt", ["T"], 0),
    ("choice", "Answer: I'm not sure", ["I"], 0),
    ("choice", "A and B", ["D. A and B"], 1),
    ("choice", "D. A and B", ["D"], 1),
    ("choice", "E. A and C", ["E. A and B"], 0),
    ("choice", "", ["B"], 0),
    ("number", "There are 3 birds", ["3"], 1),
    ("number", "3.0", ["3"], 1),
    ("number", "three", ["3"], 1),
    ("number", "1,200 of them", ["1200"], 1),
    ("number", "30", ["3"], 0),
    ("number", "9007199254740992", ["9007199254740993"], 0),  # as floats they are the same
    ("number", "1" * 5000, ["1"], 0),
    ("number", "-3", ["3"], 0),
    ("number", "none at all", ["several"], 0),
    ("number", "\u00b2", ["4"], 0),
    ("number", "\u2461", ["one"], 0),
    ("number", "3/2", ["1/2"], 0),
    ("number", "It is 1/2", ["1/2"], 1),
    ("number", "1/2", ["2"], 0),
    ("number", "9:30", ["10:30"], 0),
    ("number", "1999-05-12", ["2020-05-12"], 0),
    ("number", "2,5", ["3,5"], 0),
    ("number", "3 of the 5", ["3 of 5"], 1),
    ("number", "2 of 5", ["3 of 5"], 0),
    ("number", "\u22125", ["5"], 0),
    ("number", "\u22125", ["-5"], 1),
    ("contains", "It is a red bus.", ["red bus"], 1),
    ("contains", "It is bored", ["red", "bore"], 0),
    ("contains", "It costs 3.5", ["5"], 0),
    ("contains", "It costs 3.5.", ["3.5"], 1),
    ("contains", "12,000", ["12"], 0),
    ("contains", "12,000 people", ["12000"], 1),
    ("contains", "at 10:30", ["30"], 0),
    ("contains", "5, or 6", ["5"], 1),
    ("contains", "It is the + sign", ["+"], 1),
    ("contains", "-", ["+"], 0),
    ("contains", "It is the =\u0338 sign", ["\u2260"], 1),
    ("contains", "It is the + sign", ["-"], 0),
    ("contains", "\u7ea2\u8272\u7684\u8f66", ["\u7ea2\u8272"], 1),
    ("f1", "the cat sat", ["a cat sat down"], 0.8),
    ("f1", "it's 3,000", ["its 3000"], 1),
    ("f1", "well-known", ["well known"], 0),  # punctuation is left out, as SQuAD's script does
    ("f1", "dog", ["cat"], 0),
    ("f1", "", [""], 1),
    ("rouge_l", "the cat sat on the mat", ["a cat was sitting on the mat"], 8 / 13),  # as rouge-score 0.1.2
    ("rouge_l", "It is red.", ["it's red"], 2 / 3),
    ("rouge_l", "two dogs play in the park", ["in the park two dogs play"], 0.5),
    ("rouge_l", "红色的车", ["红的车"], 6 / 7),
]


@pytest.mark.parametrize(("name", "answer", "references", "score"), CASES)
def test_a_metric_scores_as_it_is_defined(name: str, answer: str, references: list[str], score: float) -> None:
    assert metric_of(name)([answer], [references]) == [pytest.approx(score)]


@pytest.mark.parametrize("name", ["exact", "vqa", "anls", "relaxed", "choice", "number", "contains", "f1", "rouge_l"])
@pytest.mark.parametrize("text", ["Thành phố Hồ Chí Minh", "が", "한국"])
def test_composed_letters_and_accents_by_themselves_are_the_same(name: str, text: str) -> None:
    one, other = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert one != other
    assert metric_of(name)([one, other], [[other], [one]]) == [1, 1]


def test_numbers_may_be_off_by_a_tolerance() -> None:
    assert metric_of("number", 0.1)(["95", "89"], [["100"], ["100"]]) == [1, 0]


def test_cider_is_of_a_whole_task_or_says_what_to_install() -> None:
    answers, references = ["a red bus", "a dog"], [["a red bus"], ["two cats"]]
    if importlib.util.find_spec("pycocoevalcap") is None:
        with pytest.raises(UserError, match="pycocoevalcap") as caught:
            metric_of("cider")(answers, references)
        assert "qmixlora[metrics]" in str(caught.value)
    else:
        right, wrong = metric_of("cider")(answers, references)
        assert right > 1 and wrong == 0


def test_a_metric_of_ones_own_is_called_with_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_metrics")
    module.starts = lambda answers, references: [  # type: ignore[attr-defined]
        float(answer.startswith(own[0])) for answer, own in zip(answers, references, strict=True)
    ]
    module.short = lambda answers, references: [1.0]  # type: ignore[attr-defined]
    module.mean = lambda answers, references: 0.5  # type: ignore[attr-defined]
    module.named = lambda answers, references: {"accuracy": 0.5}  # type: ignore[attr-defined]
    module.nan = lambda answers, references: [1.0, float("nan")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_metrics", module)
    assert metric_of("own_metrics:starts")(["ab", "b"], [["a"], ["a"]]) == [1, 0]
    with pytest.raises(UserError, match="1 scores for 2 answers"):
        metric_of("own_metrics:short")(["ab", "b"], [["a"], ["a"]])
    for name in ("mean", "named"):
        with pytest.raises(UserError, match=f"own_metrics:{name} gave no list of scores"):
            metric_of(f"own_metrics:{name}")(["ab", "b"], [["a"], ["a"]])
    with pytest.raises(UserError, match="own_metrics:nan gave nan for the answer 'b'") as caught:
        metric_of("own_metrics:nan")(["ab", "b"], [["a"], ["a"]])
    assert "give 0" in str(caught.value)
    with pytest.raises(UserError, match="no metric own_metrics:missing"):
        metric_of("own_metrics:missing")


@pytest.mark.parametrize(
    ("references", "name"),
    [
        ([["red"], ["top left"]], "exact"),
        ([["a man rides a horse along the beach"], ["two dogs play with a ball"], ["red"]], "rouge_l"),
        ([["yes"] * 10, ["no"] * 9 + ["yes"]], "vqa"),
        ([["yes", "yeah"], ["no"]], "exact"),
    ],
)
def test_a_task_whose_recipe_names_no_metric_gets_a_fitting_one(references: list[list[str]], name: str) -> None:
    assert fitting_metric(references) == name
