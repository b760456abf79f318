"""Control tokens of a processor: those that data never says, and those that it may say where a recipe names them."""

from __future__ import annotations

from collections.abc import Collection

from transformers import ProcessorMixin

from qmixlora.errors import UserError, did_you_mean

NAMED = "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"


def control_of(processor: ProcessorMixin, written: str) -> frozenset[str]:
    """Special tokens, the processor's placeholders, and every added token that stands in what the chat template writes
    around texts.
    """
    added = processor.tokenizer.added_tokens_decoder.values()
    control = {t.content for t in added if t.special or (t.content in written and not t.content.isspace())}
    return frozenset(control | _placeholders(processor))


def sayable_of(processor: ProcessorMixin, written: str) -> frozenset[str]:
    """The control tokens that texts may hold where a model was trained on them, such as those around a box: all but
    what the chat template and the processor write, and what begins, ends or fills a text.
    """
    own = {getattr(processor.tokenizer, name, None) for name in NAMED} | _placeholders(processor)
    return frozenset(token for token in control_of(processor, written) - own if token and token not in written)


def check_sayable(tokens: Collection[str], processor: ProcessorMixin, written: str) -> None:
    """Raise UserError for tokens that are none of `sayable_of`."""
    sayable, control = sayable_of(processor, written), control_of(processor, written)
    for token in set(tokens) - sayable:
        if token in control:
            raise UserError(
                f"{token!r} is what the model's chat template or its processor writes: data cannot hold it.",
                where="data.special_tokens",
                fix="Leave it out: in data it is encoded as letters.",
            )
        raise UserError(
            f"The model's tokenizer has no special token {token!r}.{did_you_mean(token, sayable)}",
            where="data.special_tokens",
            fix="Leave it out: what is no special token needs no name here.",
        )


def _placeholders(processor: ProcessorMixin) -> set[str]:
    """The texts that the processor puts image tokens in the place of."""
    own = vars(processor).items()
    return {text for name, text in own if name.endswith("_token") and isinstance(text, str) and text}
