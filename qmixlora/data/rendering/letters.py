"""Control tokens that data quotes, such as `<|im_end|>` in a question about it: encoded as letters.

A tokenizer takes every control token that it reads for one that the chat template wrote. So what is quoted travels
through template and processor as a character of private use, which nothing there takes for a control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

FIRST, LAST = 0x100000, 0x10FFFD  # plane 16, all of which Unicode leaves to private use
START, END = chr(LAST - 1), chr(LAST)  # around what is supervised: see `tokenizing.py`
MARK = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


class Letters:
    """Puts characters of private use in the place of what a text may not say to a tokenizer, and encodes them."""

    def __init__(self, tokenizer: Any, control: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.control = sorted({token for token in control if token}, key=len, reverse=True)  # the longer one wins
        self._quoted: list[str] = []  # by their marks' numbers
        self._marks: dict[str, str] = {}
        self._ids: dict[str, list[int]] = {}

    def quote(self, text: str) -> str:
        """The text with a mark for every control token in it, and for every character that is a mark itself."""
        return self._pattern.sub(lambda match: self._mark(match.group()), text)

    def unquote(self, text: str) -> str:
        """The text as `quote` got it."""
        return MARK.sub(lambda match: self._quoted[ord(match.group()) - FIRST], text)

    def ids(self, mark: str) -> list[int]:
        """The tokens of what a mark stands for, letter by letter; START and END have none."""
        if mark in (START, END):
            return []
        if mark not in self._ids:
            self._ids[mark] = self._spelled(self.unquote(mark))
        return self._ids[mark]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join([*map(re.escape, self.control), MARK.pattern]))

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        """The ids that letters never become. (What a tokenizer gives for letters that it does not know is allowed.)"""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        unknown = {self.tokenizer.unk_token, getattr(backend and backend.model, "unk_token", None)}
        tokens = set(self.control) - unknown | {self.tokenizer.eos_token}
        vocabulary = self.tokenizer.get_vocab()
        return frozenset(vocabulary[token] for token in tokens if token in vocabulary)

    def _mark(self, quoted: str) -> str:
        if quoted not in self._marks:
            assert FIRST + len(self._quoted) < ord(START), "a text has 65,000 different characters of private use"
            self._marks[quoted] = chr(FIRST + len(self._quoted))
            self._quoted.append(quoted)
        return self._marks[quoted]

    def _spelled(self, text: str) -> list[int]:
        """The tokens of a text without any added token. Where the vocabulary makes a control token of its letters, they
        are encoded apart.
        """
        line, ids = self._plain("\n"), self._plain("\n" + text)
        ids = ids[len(line) :] if ids[: len(line)] == line else self._plain(text)  # no blank first: tokenizing.py
        if self._forbidden.isdisjoint(ids):
            return ids
        return [] if len(text) == 1 else self._spelled(text[0]) + self._spelled(text[1:])

    def _plain(self, text: str) -> list[int]:
        """A text through all steps of the tokenizer but that which looks for added tokens (as transformers 5.23 does,
        `_encode_without_added_tokens`).
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        parts = (
            [text] if backend.pre_tokenizer is None else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        return [token.id for part in parts for token in backend.model.tokenize(part)]
