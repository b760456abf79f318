"""Fingerprints, made with stock libraries: of an export, or of an adapter that another tool has made."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qmixlora.errors import UserError

from .comparison import difference
from .fingerprint import BASE, EXPORT, Answer, Fingerprint, Message, Prompt
from .stock import StockModel, clear_load_errors, load_model, put_adapter, versions

MAX_TOKENS = 16
QUESTIONS = ("What is in this picture?", "Name the largest thing in it.", "How are you?", "Count to ten.")
SHAPES = ((320, 240), (1200, 900))  # width, height; a small image, and one over most limits


def make_fingerprint(
    name: str,
    form: str,
    dtype: str,
    max_tokens: int,
    prompts: Sequence[list[Message]],
    answers: Mapping[str, Sequence[Answer]],
    template_arguments: Mapping[str, Any] | None = None,
) -> Fingerprint:
    """A fingerprint of answers to the same prompts, by whose they are."""
    pairs = [
        Prompt(messages, {whose: own[index] for whose, own in answers.items()})
        for index, messages in enumerate(prompts)
    ]
    return Fingerprint(name, form, dtype, max_tokens, pairs, dict(template_arguments or {}), versions())


def answers_of(stock: StockModel, prompts: Sequence[list[Message]], max_tokens: int) -> list[Answer]:
    """A model's answers to prompts."""
    return [stock.answer(messages, max_tokens) for messages in prompts]


def fingerprint_adapter(adapter: Path, base: str, dtype: str) -> Fingerprint:
    """Make the fingerprint of any PEFT adapter on a base, by questions of our own about drawn images.

    Raises:
        UserError: the base or the adapter cannot be loaded, or the adapter does not fit: PEFT leaves out tensors whose
            names it does not know with a warning alone, and the model answers as the base.
    """
    prompts = [asked(question, image) for question, image in zip(QUESTIONS, drawn_images(), strict=False)]
    prompts += [asked(question) for question in QUESTIONS[len(prompts) :]]
    where, fix = f"{adapter}, on {base}", "Name its own base."
    with clear_load_errors("The adapter does not load on this base", where, fix):
        stock = load_model(base, dtype)
        answers = {BASE: answers_of(stock, prompts, MAX_TOKENS)}
        put_adapter(stock, adapter)
    answers[EXPORT] = answers_of(stock, prompts, MAX_TOKENS)
    if difference(answers[EXPORT], answers[BASE]).largest == 0:
        raise UserError(
            "With the adapter the base answers as without it: its tensors are of another model, or all zero.",
            where=where,
            fix=fix,
        )
    precision = str(stock.model.dtype).removeprefix("torch.")
    return make_fingerprint(adapter.resolve().name, "lora", precision, MAX_TOKENS, prompts, answers)


def asked(question: str, image: Image.Image | None = None) -> list[Message]:
    """One question, about an image or about none, as OpenAI's protocol has it."""
    about = [] if image is None else [image_part(image)]
    return [{"role": "user", "content": [*about, {"type": "text", "text": question}]}]


def image_part(image: Image.Image) -> dict[str, Any]:
    """An image in a message: a PNG, which every server decodes to the same pixels, as a data URI."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def drawn_images() -> list[Image.Image]:
    """Images with something to see, the same ones on every machine: colours that run across, and a square."""
    images = []
    for width, height in SHAPES:
        across, down = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
        image = Image.merge("RGB", (across, down, Image.new("L", across.size, 96))).resize((width, height))
        image.paste((250, 220, 30), (width // 8, height // 4, width // 2, 3 * height // 4))
        images.append(image)
    return images
