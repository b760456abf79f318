"""Conversations to a batch: tokens, pixels, labels on the answers alone, and what is routed on.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import ProcessorMixin

from qmixlora.data.formats import Conversation, Turn, question_about, sample_name
from qmixlora.data.images.opening import blank_image, open_images
from qmixlora.data.images.shapes import naming_refused_images
from qmixlora.errors import UserError
from qmixlora.mixlora import IGNORED, prompt_mask

from .refusing import check_length, naming
from .template import ChatTemplate
from .tokenizing import Encoded, PieceTokenizer, reading_with

MIXED = "Samples with images are in one batch with samples without, which this model computes otherwise than alone."


class PromptRouting(TypedDict):
    """What `generate` does not take of a batch of prompts, and `routed_as` does."""

    tasks: list[str | list[str]]
    segments: Tensor
    routing_mask: Tensor


@dataclass
class Collator:
    """Rows of `load_conversations` to model inputs, through the processor's own chat template.

    Calling it gives what the processor gives (`input_ids` B x S, `attention_mask`, `pixel_values`, ...) padded on the
    right, and
      labels        B x S, the token on answers that are learned, the token that ends each of them included, -100
                    everywhere else
      segments      B x S, the number of each token's segment, -1 on padding. A segment is an answer, with the token
                    that ends it, and all that stands between it and the answer before
      routing_mask  B x S, true in every segment before its answer, never on padding
      tasks         B task labels; for a row whose answers are of several tasks, a list of one for each segment

    Where `template.teaches_all` does not hold for a row, its last answer alone is supervised (`one_answer_each` makes a
    row of every answer). Nothing is ever cut: a sample over `max_length` tokens raises UserError.
    """

    processor: ProcessorMixin
    max_length: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None  # of pixels: the model's (some models do not cast them)
    special_tokens: Sequence[str] = ()  # that data says as themselves, and answers keep

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        texts = []
        for row in rows:
            with naming(row):
                texts.append(self.template.conversation(row["turns"]))
        batch, samples = self._encode(texts, rows, "right")
        for row, ids_S, sample in zip(rows, batch["input_ids"], samples, strict=True):
            with naming(row):
                self._check(sample, ids_S)
        segments_BS, answers_BS = segments_and_answers(batch, samples, asks=False)
        routing_mask_BS = prompt_mask(answers_BS, batch["attention_mask"], segments_BS)
        labels_BS = learned_alone(answers_BS, rows, samples)
        tasks = [segment_tasks(row, len(sample.spans)) for row, sample in zip(rows, samples, strict=True)]
        return {**batch, "labels": labels_BS, "segments": segments_BS, "routing_mask": routing_mask_BS, "tasks": tasks}

    def prompts(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        """Inputs for `generate`: each conversation up to its last answer, padded on the left."""
        return self.routed_prompts(rows)[0]

    def routed_prompts(self, rows: Sequence[Conversation]) -> tuple[dict[str, Any], PromptRouting]:
        """(`prompts`, what to give to `routed_as` around `generate`). Earlier answers have their segments, as in
        training; the last segment is the question, and the answer to come.
        """
        texts = []
        for row in rows:
            with naming(row):
                texts.append(self.template.prompt(row["turns"]))
        batch, samples = self._encode(texts, rows, "left")
        segments_BS, answers_BS = segments_and_answers(batch, samples, asks=True)
        return batch, {
            "tasks": [segment_tasks(row, len(own.spans) + 1) for row, own in zip(rows, samples, strict=True)],
            "segments": segments_BS,
            "routing_mask": prompt_mask(answers_BS, batch["attention_mask"], segments_BS),
        }

    def tokens(self, turns: Sequence[Turn], prompt: bool = False) -> list[int]:
        """The tokens of a conversation (of a prompt: with what begins the answer), each image still one mark (or as
        many as the template writes).
        """
        answered: list[Turn] = [*turns, {"role": "assistant", "text": ""}]
        text = self.template.prompt(answered) if prompt else self.template.conversation(turns)
        return self._reader.encode([text], self._adds_special_tokens(text))[0].ids

    def processed(self, row: Conversation) -> list[int]:
        """The tokens of a row as a batch has them, its images in them, however many there are."""
        batch, _ = self._encode([self.template.conversation(row["turns"])], [row], "right")
        ids_S: list[int] = batch["input_ids"][0].tolist()
        return ids_S

    def decode(self, tokens_BS: Tensor) -> list[str]:
        """Generated tokens as text, up to the first that generation stops at, as `text_of`."""
        stops = set(self.stop_ids)
        answers = []
        for tokens_S in tokens_BS.tolist():
            length = next((index for index, token in enumerate(tokens_S) if token in stops), len(tokens_S))
            answers.append(self.text_of(tokens_S[:length]))
        return answers

    def text_of(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special tokens but those that data says."""
        own = [token for token in tokens if token not in self._left_out]
        return str(self.processor.tokenizer.decode(own, skip_special_tokens=not self.special_tokens))

    @cached_property
    def _left_out(self) -> frozenset[int]:
        """Where data says special tokens, the others."""
        if not self.special_tokens:
            return frozenset()
        tokenizer = self.processor.tokenizer
        return frozenset(tokenizer.all_special_ids) - {*tokenizer.convert_tokens_to_ids(list(self.special_tokens))}

    def of_one_kind(self, rows: Sequence[Conversation]) -> list[list[int]]:
        """Rows by number, in as few batches as there have to be: one, or two where the model does not mix (`mixes`)."""
        kinds = [[i for i, row in enumerate(rows) if bool(row["images"]) is shown] for shown in (False, True)]
        return kinds if all(kinds) and not self.mixes else [list(range(len(rows)))]

    @cached_property
    def mixes(self) -> bool:
        """Whether a batch may hold samples with images and samples without. Llama 3.2 Vision's may not: its processor
        looks for tiles in all of them, and its cross-attention changes those without where others have some.
        """
        rows = [question_about([], "?"), question_about([blank_image((64, 64))], "?")]
        images = [open_images(row["images"]) for row in rows]
        try:
            texts = [self.template.prompt(row["turns"]) for row in rows]
            self.processor(text=texts, images=self._arranged(images), padding=True, return_tensors="pt")
        except IndexError:
            return False
        except (UserError, ValueError, TypeError, AttributeError, RuntimeError):  # of other reasons, told by a batch
            return True
        return True

    @cached_property
    def template(self) -> ChatTemplate:
        """The processor's chat template with what the recipe says of it."""
        return ChatTemplate(self.processor, self.template_arguments, self.special_tokens)

    @cached_property
    def pad_token_id(self) -> int | None:
        """The token that fills short samples."""
        token: int | None = self.processor.tokenizer.pad_token_id
        return token

    @cached_property
    def end_id(self) -> int:
        """The token that every answer's labels end in. Raises UserError as `ChatTemplate.end_token`."""
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.template.end_token))

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that generation stops at, whatever the checkpoint's generation config knows."""
        eos = self.processor.tokenizer.eos_token_id
        return sorted({self.end_id} | (set() if eos is None else {eos}))

    @cached_property
    def _reader(self) -> PieceTokenizer:
        return PieceTokenizer(self.template.letters)

    def _encode(
        self, texts: list[str], rows: Sequence[Conversation], side: str
    ) -> tuple[dict[str, Any], list[Encoded]]:
        images = [open_images(row["images"], named_by=sample_name(row)) for row in rows]
        if any(images) and not all(images) and not self.mixes:
            raise UserError(MIXED, where="", fix="Set the batch size to 1.")
        reader = PieceTokenizer(self.template.letters)
        with naming_refused_images(self.processor, rows):
            encoded = reading_with(self.processor, reader)(
                text=texts,
                images=self._arranged(images) if any(images) else None,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                add_special_tokens=self._adds_special_tokens(texts[0]),
            )
        assert len(reader.encoded) == len(texts), f"{type(self.processor).__name__} tokenizes all texts at once"
        return {name: self._cast(value) for name, value in encoded.items()}, reader.encoded

    def _arranged(self, images: list[list[Any]]) -> list[Any]:
        """The images of samples as the processor takes them: by sample, or (GOT-OCR2) one after the other."""
        return images if self._takes_nested else [image for own in images for image in own]

    @cached_property
    def _takes_nested(self) -> bool:
        asked = question_about([blank_image((64, 64))], "?")
        images = [open_images(asked["images"])]
        try:
            self.processor(text=[self.template.prompt(asked["turns"])], images=images, return_tensors="pt")
        except ValueError as error:
            return not str(error).startswith("Nested images")
        return True

    def _cast(self, value: Any) -> Any:
        is_pixels = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if is_pixels else value

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must add special tokens that the chat template left out (as transformers decides)."""
        bos = self.processor.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _check(self, sample: Encoded, ids_S: Tensor) -> None:
        """Raises UserError for a sample that is too long, or whose labels would not be its answers."""
        length = len(sample.ids)
        check_length(length, self.max_length)
        if ids_S[:length].tolist() != sample.ids:
            raise UserError("The model's processor changes tokens after the tokenizer, so labels cannot be placed.")
        for start, end in sample.spans:
            *answer, last = sample.ids[start:end]
            if last != self.end_id or not set(self.stop_ids).isdisjoint(answer):
                raise UserError(
                    f"The tokens of an answer do not end in {self.template.end_token!r}, once and at its end.",
                    fix="Remove the sample: its text is a control token to this tokenizer.",
                )


def segments_and_answers(batch: dict[str, Any], samples: Sequence[Encoded], asks: bool) -> tuple[Tensor, Tensor]:
    """(the number of every token's segment, -1 on padding; the tokens of answers, -100 elsewhere), both B x S.

    `asks`: what comes after the last answer is a question, of another segment; else it belongs to that answer's.
    """
    segments_BS = batch["attention_mask"].long() - 1
    answers_BS = torch.full_like(segments_BS, IGNORED)
    for own_S, answers_S, ids_S, sample in zip(segments_BS, answers_BS, batch["input_ids"], samples, strict=True):
        begin = int((own_S == 0).long().argmax())  # after the padding on the left
        for number, (start, end) in enumerate(sample.spans, start=1):
            answers_S[begin + start : begin + end] = ids_S[begin + start : begin + end]
            if asks or number < len(sample.spans):
                own_S[begin + end : begin + len(sample.ids)] = number
    return segments_BS, answers_BS


def learned_alone(answers_BS: Tensor, rows: Sequence[Conversation], samples: Sequence[Encoded]) -> Tensor:
    """Of answers (B x S, not padded on the left), those that are to be learned."""
    labels_BS = answers_BS.clone()
    for labels_S, row, sample in zip(labels_BS, rows, samples, strict=True):
        # of some, the last alone
        taught = zip(reversed(sample.spans), reversed(row.get("learned") or []), strict=False)
        for start, end in (span for span, is_learned in taught if not is_learned):
            labels_S[start:end] = IGNORED
    return labels_BS


def segment_tasks(row: Conversation, segments: int) -> str | list[str]:
    """The task of a row; where its answers are of several, those of its last so many segments."""
    own = (row.get("tasks") or [row["task"]])[-segments:]
    return own[-1] if len(set(own)) == 1 else own
