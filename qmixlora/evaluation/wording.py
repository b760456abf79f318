"""Answers brought into one wording, so that what means the same is the same text: all of it in composed letters.

`normalize` is ours; `vqa_wording` is after the VQA challenge's evaluation (Antol et al. 2015), `words` after SQuAD's
(Rajpurkar et al. 2016) where articles do not count, and after ROUGE's where they do.
"""

from __future__ import annotations

import re
import string
import unicodedata
from decimal import Decimal

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
SIGN = r"(?:(?<!\w)[-+\u2212])?"
UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
QUANTITY = re.compile(rf"{SIGN}{UNSIGNED}(?:[-/:,.]{UNSIGNED})*")  # also 1/2, 9:30, 2020-05-12


def composed(text: str) -> str:
    """A text in composed letters (NFC): many tokenizers can say no others, and data may hold an accent by itself."""
    return unicodedata.normalize("NFC", text)


def normalize(answer: str) -> str:
    """Normalise an answer for exact match: case, runs of blanks and closing full stops do not count.

    Normalising twice is normalising once.
    """
    text = composed(composed(answer).casefold())  # case that is folded may take letters apart
    return re.sub(r"\s+", " ", text).strip().rstrip(" .")


def vqa_wording(answer: str) -> str:
    """An answer in the wording of the VQA challenge: without its marks of punctuation, full stops but in numbers,
    apostrophes and articles, and with digits for the names of numbers up to ten. Signs that mean something ($, %) stay.

    As in the challenge's code a mark is a blank only where it has none beside it anywhere, and no comma is in a number.
    """
    text = " ".join(composed(answer).split()).lower()
    has_thousands = re.search(r"\d,\d", text) is not None
    gone = {mark for mark in MARKS if has_thousands or f"{mark} " in text or f" {mark}" in text}
    text = "".join("" if letter in gone else " " if _is_mark(letter) else letter for letter in text)
    text = re.sub(r"\.(?!\d)|['\u2019]", "", text)
    found = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in found if word not in ARTICLES)


def _is_mark(letter: str) -> bool:
    """Whether a character is a mark of the challenge's, or punctuation that ASCII does not have."""
    return letter in MARKS or (letter != "\u2019" and ord(letter) > 127 and unicodedata.category(letter)[0] == "P")


def words(text: str, *, articles: bool) -> list[str]:
    """The words of a text in lower case, without punctuation: with articles, after ROUGE (it stands between words), or
    without, after SQuAD (it is left out: `it's` is `its`). A character of a script that is written without
    blanks (Chinese, Japanese, Thai) is a word of its own.
    """
    text = composed(text)
    if not articles:
        text = text.translate(str.maketrans("", "", string.punctuation))
    spaced = "".join(f" {letter} " if _stands_alone(letter) else letter for letter in text.lower())
    found = re.findall(r"[^\W_]+", spaced)
    return [word for word in found if articles or word not in ARTICLES]


def _stands_alone(letter: str) -> bool:
    return "\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff" or "\u0e00" <= letter <= "\u0e7f"


def whole_words(text: str) -> list[str]:
    """The words of a text as in `words`, but that a number is one of them as it is written, with its sign and without
    the commas of thousands: 3.5, 12000, 1/2, 9:30.
    """
    found = re.finditer(rf"(?:{QUANTITY.pattern})?[^\W_]*", composed(text).lower())
    parts = (_plain(one.group()) if QUANTITY.match(one.group()) else one.group() for one in found)
    return [word for part in parts for word in ([part] if QUANTITY.match(part) else words(part, articles=True))]


def quantities_in(text: str) -> list[list[Decimal]]:
    """The quantities of a text, in their order, each with its numbers: 1,234.5 is one number, 3-5, 1/2 and 9:30 are one
    quantity of two; a share in percent is as it is written (5 % is 5). Where there is no digit: the names of numbers up
    to ten.
    """
    found = [one.group() for one in QUANTITY.finditer(text)]
    found = found or [word for word in vqa_wording(text).split() if word.isdecimal()]
    return [[Decimal(number) for number in re.findall(rf"{SIGN}{UNSIGNED}", _plain(one))] for one in found]


def _plain(number: str) -> str:
    """A number without the commas of thousands, and with the minus sign of keyboards."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number).replace("\u2212", "-").removeprefix("+")
