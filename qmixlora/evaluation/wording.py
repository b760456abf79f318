"""Answers brought into one wording, so that what means the same is the same text.

`normalize` is ours; `vqa_wording` is after the VQA challenge's evaluation (Antol et al. 2015), `words` after SQuAD's
(Rajpurkar et al. 2016) where articles do not count, and after ROUGE's where they do.
"""

from __future__ import annotations

import re
import unicodedata

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def normalize(answer: str) -> str:
    """Normalise an answer for exact match: case, runs of blanks and closing full stops do not count.

    Normalising twice is normalising once.
    """
    return re.sub(r"\s+", " ", answer).strip().rstrip(" .").casefold()


def vqa_wording(answer: str) -> str:
    """An answer in the wording of the VQA challenge: no punctuation (but in numbers), no articles, digits for the names
    of numbers up to ten.
    """
    text = re.sub(r"\s+", " ", answer).strip().lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = "".join(" " if _is_mark(text, index) else letter for index, letter in enumerate(text))
    found = (NUMBERS.get(word, word) for word in text.replace("'", "").split())
    return " ".join(word for word in found if word not in ARTICLES)


def _is_mark(text: str, index: int) -> bool:
    """Whether a character is punctuation; a full stop between digits and an apostrophe are not."""
    letter = text[index]
    if letter == "'" or not unicodedata.category(letter).startswith(("P", "S")):
        return False
    inside = 0 < index < len(text) - 1
    return not (letter == "." and inside and text[index - 1].isdigit() and text[index + 1].isdigit())


def words(text: str, *, articles: bool) -> list[str]:
    """The words of a text in lower case, without punctuation; with or without articles. A character of a script that is
    written without blanks (Chinese, Japanese, Thai) is a word of its own.
    """
    spaced = "".join(f" {letter} " if _stands_alone(letter) else letter for letter in text.lower())
    found = re.findall(r"[^\W_]+", spaced)
    return [word for word in found if articles or word not in ARTICLES]


def _stands_alone(letter: str) -> bool:
    return "\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff" or "\u0e00" <= letter <= "\u0e7f"


def numbers_in(text: str) -> list[float]:
    """The numbers of a text, in their order: 1,234.5 is one, 3-5 are two; a share in percent is as it is written (5 %
    is 5). Where there is no digit: the names of numbers up to ten.
    """
    found = NUMBER.findall(text) or [word for word in vqa_wording(text).split() if word.isdigit()]
    return [float(number.replace(",", "")) for number in found]
