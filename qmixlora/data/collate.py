"""Conversations to a batch: tokens, pixels, labels on the answers alone, and the routing mask.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import ProcessorMixin

from qmixlora.errors import UserError
from qmixlora.mixlora import IGNORED, prompt_mask

from .formats import IMAGE, Conversation, Turn, to_messages
from .images import open_images


class BatchCollator(Protocol):
    """Makes model inputs of rows, for training and for generation, and text of generated tokens."""

    @property
    def pad_token_id(self) -> int | None: ...

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Any]: ...

    def prompts(self, rows: Sequence[Conversation]) -> dict[str, Any]: ...

    def decode(self, tokens_BS: Tensor) -> list[str]: ...


@dataclass
class Collator:
    """Rows of `load_conversations` to model inputs, through the processor's own chat template.

    Calling it gives what the processor gives (`input_ids` B x S, `attention_mask`, `pixel_values`, ...) padded on the
    right, and
      labels        B x S, the token on answers (their end-of-turn tokens included), -100 everywhere else
      routing_mask  B x S, true before the first supervised token, never on padding
      tasks         B task labels

    Nothing is ever cut: a sample over `max_length` tokens raises UserError.
    """

    processor: ProcessorMixin
    max_length: int

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        texts = [self._render(row["turns"]) for row in rows]
        batch = self._encode(texts, rows, "right")
        lengths_B = batch["attention_mask"].sum(dim=1)
        labels_BS = torch.full_like(batch["input_ids"], IGNORED)
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            length = int(lengths_B[index])
            if length > self.max_length:
                raise UserError(
                    f"A sample has {length} tokens, over data.max_length, {self.max_length}; samples are never cut.",
                    where=f"task {row['task']}: {row['turns'][0]['text'][:80]!r}",
                    fix="Raise data.max_length or remove the sample.",
                )
            for start, end in self._answers(row["turns"], text):
                # counted from the end, since the processor replaces each image's mark by many tokens
                ids_S = batch["input_ids"][index]
                labels_BS[index, length - start : length - end] = ids_S[length - start : length - end]
        batch["labels"] = labels_BS
        batch["routing_mask"] = prompt_mask(labels_BS, batch["attention_mask"])
        batch["tasks"] = [row["task"] for row in rows]
        return batch

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills short samples."""
        token: int | None = self.processor.tokenizer.pad_token_id
        return token

    def decode(self, tokens_BS: Tensor) -> list[str]:
        """Generated tokens as text, without special tokens."""
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens_BS, skip_special_tokens=True)
        return texts

    def prompts(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        """Inputs for `generate`: each conversation up to its last answer, padded on the left."""
        return self._encode([self._render(row["turns"][:-1], prompt=True) for row in rows], rows, "left")

    def tokens(self, turns: Sequence[Turn], prompt: bool = False) -> list[int]:
        """The tokens of a conversation (of a prompt: with what begins the answer), each image still one mark (or as
        many as the template writes).
        """
        text = self._render(turns, prompt)
        return self._tokens(text, text)

    def _render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        text: str = self.processor.apply_chat_template(to_messages(turns), add_generation_prompt=prompt)
        return text

    def _encode(self, texts: list[str], rows: Sequence[Conversation], side: str) -> dict[str, Any]:
        images = [open_images(row["images"]) for row in rows]
        encoded = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side=side,
            return_tensors="pt",
            add_special_tokens=self._adds_special_tokens(texts[0]),
        )
        return dict(encoded)

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must add special tokens that the chat template left out (as transformers decides)."""
        bos = self.processor.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _tokens(self, text: str, whole: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        return list(tokenizer(text, add_special_tokens=self._adds_special_tokens(whole))["input_ids"])

    def _answers(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """(start, end) of every answer, in tokens from the end of the sample.

        An answer starts where the conversation with it and the prompt for it part, and ends where the conversation up
        to it and the whole one part: the spans that generation would have to produce.
        """
        tokens = self._tokens(text, text)
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if any(IMAGE in later["text"] for later in turns[index + 1 :]):
                raise UserError(
                    "An image follows an answer; images must come before the first answer.",
                    where=f"{turns[0]['text'][:80]!r}",
                    fix="Split the conversation.",
                )
            before = self._tokens(self._render(turns[:index], prompt=True), text)
            until = tokens if index == len(turns) - 1 else self._tokens(self._render(turns[: index + 1]), text)
            spans.append((len(tokens) - _common(before, tokens), len(tokens) - _common(until, tokens)))
        return spans


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
