"""Text to tokens in pieces that meet where a supervised span begins or ends, or where letters are quoted.

So a prompt has the tokens that generation will give it, whatever follows; and labels are found by pieces, wherever
the processor puts however many image tokens.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import BatchEncoding, ProcessorMixin

from .letters import END, MARK, START, Letters

_SPLIT = re.compile(f"({MARK.pattern})")


class Piece(NamedTuple):
    """A part of a text without marks: where it begins, in characters and in tokens."""

    text: str
    char: int
    token: int


class Encoded(NamedTuple):
    """The tokens of a text, its supervised spans, (start, end) in tokens, and what was tokenised at a time."""

    ids: list[int]
    spans: list[tuple[int, int]]
    pieces: list[Piece]


class PieceEncoding(BatchEncoding):
    """Inputs of pieces that tell the token of a character, which some processors ask for (Idefics3)."""

    reader: PieceTokenizer

    def char_to_token(  # type: ignore[override]
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token of a character (of the sample, where two numbers are given)."""
        sample, char = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        return self.reader.token_at(sample, char)


class PieceTokenizer:
    """Stands in for a processor's tokenizer: reads the texts that the processor has put its image tokens into."""

    def __init__(self, letters: Letters) -> None:
        self._tokenizer = letters.tokenizer
        self._letters = letters
        self.encoded: list[Encoded] = []  # of the last call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_tokenizer":  # a copy that is being made has no attributes yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: Any = False,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **_: Any,
    ) -> BatchEncoding:
        """As a tokenizer's; never cut. Padding is to the longest, whatever its kind."""
        texts = [text] if isinstance(text, str) else list(text)
        self.encoded = self.encode(texts, add_special_tokens)
        ids = [list(encoded.ids) for encoded in self.encoded]
        attention = [[1] * len(own) for own in ids]
        if padding:
            width, fill = max(map(len, ids)), self._tokenizer.pad_token_id or 0
            left = (padding_side or self._tokenizer.padding_side) == "left"
            for rows, value in ((ids, fill), (attention, 0)):
                for index, row in enumerate(rows):
                    rest = [value] * (width - len(row))
                    rows[index] = rest + row if left else row + rest
        one = isinstance(text, str) and return_tensors is None
        data = {"input_ids": ids[0] if one else ids, "attention_mask": attention[0] if one else attention}
        encoding = PieceEncoding(data, tensor_type=return_tensors)
        encoding.reader = self
        return encoding

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoded]:
        """The tokens of texts with marks in them."""
        split = [_SPLIT.split(text) for text in texts]  # text, mark, text, mark, ..., text
        heads = self._plain([parts[0] for parts in split])
        inner = iter(self._within([part for parts in split for part in parts[2::2]]))
        begin = self._begin if add_special_tokens else []
        encoded = []
        for parts, head in zip(split, heads, strict=True):
            pieces, char, start = [Piece(parts[0], 0, len(begin))], len(parts[0]), 0
            ids: list[int] = [*begin, *head]
            spans: list[tuple[int, int]] = []
            for mark, part in zip(parts[1::2], parts[2::2], strict=True):
                if mark == START:
                    start = len(ids)
                elif mark == END:
                    spans.append((start, len(ids)))
                ids += self._letters.ids(mark)
                pieces.append(Piece(part, char + 1, len(ids)))
                ids += next(inner)
                char += 1 + len(part)
            encoded.append(Encoded(ids, spans, pieces))
        return encoded

    def token_at(self, sample: int, char: int) -> int | None:
        """The token of a character in the last call's texts, were they not padded; None for a mark or a blank."""
        pieces = self.encoded[sample].pieces
        number = bisect(pieces, char, key=lambda piece: piece.char) - 1
        text, first, token = pieces[number]
        if char >= first + len(text):
            return None
        head = "\n" if number else ""
        if head and self._plain(["\n" + text])[0][: len(self._line)] != self._line:
            head = ""
        inside = self._tokenizer(head + text, add_special_tokens=False).char_to_token(char - first + len(head))
        return None if inside is None else token + inside - (len(self._line) if head else 0)

    def _within(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts that stand inside another one.

        Encoded after a line's end, which is taken off again: SentencePiece puts a blank in front of what it takes for
        the beginning (as transformers 5.23 does, `encode_marked_chat`).
        """
        line = self._line
        encoded = self._plain(["\n" + text for text in texts])
        alone = [index for index, ids in enumerate(encoded) if ids[: len(line)] != line]
        for index, ids in zip(alone, self._plain([texts[index] for index in alone]), strict=True):
            encoded[index] = [*line, *ids]
        return [ids[len(line) :] if text else [] for text, ids in zip(texts, encoded, strict=True)]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return [list(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    @cached_property
    def _line(self) -> list[int]:
        return self._plain(["\n"])[0]

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer adds in front of a text. (What it adds behind has no place in a conversation.)"""
        [letter], whole = self._plain(["a"]), list(self._tokenizer("a")["input_ids"])
        ends = (index for index in range(len(whole)) if whole[index : index + len(letter)] == letter)
        return whole[: next(ends, len(whole))]


def reading_with(processor: ProcessorMixin, tokenizer: PieceTokenizer) -> ProcessorMixin:
    """The processor, its parts shared, with this tokenizer in the place of its own."""
    reading = copy.copy(processor)
    reading.tokenizer = tokenizer
    return reading
