"""A check before the first step: no answer is visible while it is learned."""

from __future__ import annotations

import torch

from qmixlora.data import IGNORED, Collator, Conversation
from qmixlora.errors import UserError
from qmixlora.loss import supervised_logits_in_chunks
from qmixlora.session import TunedSession

TOLERANCE = 8  # times the precision of the model's dtype, of the largest logit


def check_look_ahead(session: TunedSession, row: Conversation) -> None:
    """Raise UserError where another last token of a row's answer changes the logits of any token that it learns.

    Such a model reads answers in both directions (by what its processor adds to the inputs, such as `token_type_ids`),
    and would learn to copy what it cannot see in generation.
    """
    collator = session.collator
    assert isinstance(collator, Collator), "a run has a processor"
    batch = session.on_device(collator([row]))
    last = int((batch["labels"][0] != IGNORED).nonzero().max())
    changed = batch["input_ids"].clone()
    changed[0, last] = _another_token(collator, int(changed[0, last]))
    chunk = session.recipe.train.loss_chunk  # as many logits at a time as in training
    with torch.no_grad(), session.evaluating():
        pairs = zip(
            supervised_logits_in_chunks(session.model, batch, chunk),
            supervised_logits_in_chunks(session.model, {**batch, "input_ids": changed}, chunk),
            strict=True,
        )
        sizes = [(logits_CV.abs().max(), (logits_CV.float() - others_CV).abs().max()) for logits_CV, others_CV in pairs]
    largest, difference = (torch.stack(column).max() for column in zip(*sizes, strict=True))
    precision = torch.finfo(getattr(torch, session.recipe.model.dtype)).eps
    if difference > TOLERANCE * precision * largest:
        raise UserError(
            f"{type(session.backbone).__name__} reads a token of the answer before it has to predict it, with the "
            "inputs that its processor makes: answers would be copied in training, and cannot be in generation.",
            where=f"model.id: {session.recipe.model.id}",
            fix="Use another family of models, whose decoder reads answers from the left alone.",
        )


def _another_token(collator: Collator, token: int) -> int:
    """A token of ordinary text other than this one."""
    tokenizer = collator.processor.tokenizer
    texts = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in "ab")
    return int(next(other for other in texts if other != token))
