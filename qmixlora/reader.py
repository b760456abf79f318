"""What a model's processor makes of texts and images, as digests that tell whether it is another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import ProcessorMixin

TEMPLATE, TOKENIZER, IMAGES = "template", "tokenizer", "images"  # what is recorded of a processor
# settings of a processor that change nothing of what an image becomes, or are of other than images
NOT_OF_IMAGES = {
    "transformers_version", "name_or_path", "processor_class", "image_processor_type", "auto_map", "device",
    "data_format", "input_data_format", "return_tensors", "disable_grouping", "padding_side", "tokenizer",
    "video_processor", "feature_extractor", "audio_tokenizer",
}  # fmt: skip
PROBE = (  # letters, digits, white space and signs that tokenizers cut, fold or spell in ways of their own
    " What is  shown?\nA 12,345.67-year-old CAF\u00c9 cafe\u0301\tit's x_y</s>"
    " \u2460 \ufb01 \u4e2d\u6587 \u0440\u0443\u0441 \U0001f600"
)


def read_by(processor: ProcessorMixin) -> dict[str, str]:
    """Digests of a processor's chat template; of its tokenizer's vocabulary, with what a text of all kinds becomes; and
    of how it makes pixels, and tokens in their place.

    They are the same wherever the model lies, and whatever was padded or cut before; a release of the libraries that
    encodes as before has the same.
    """
    tokenizer: Any = getattr(processor, "tokenizer", None)
    added = sorted(
        (token.content, number, token.lstrip, token.rstrip, token.single_word)
        for number, token in tokenizer.added_tokens_decoder.items()
    )
    # with those that the tokenizer adds itself, and without
    encoded = [tokenizer(PROBE, add_special_tokens=own)["input_ids"] for own in (False, True)]
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    return {
        TEMPLATE: _digest(processor.chat_template),
        TOKENIZER: _digest([sorted(tokenizer.get_vocab().items()), added, encoded, ends]),
        IMAGES: _digest(_of_images(json.loads(processor.to_json_string()))),
    }


def _of_images(settings: Any) -> Any:
    """Settings that say what an image becomes; what is not set is as good as a key that another release lacks."""
    if not isinstance(settings, dict):
        return settings
    kept = {name: _of_images(value) for name, value in settings.items() if name not in NOT_OF_IMAGES}
    return {name: value for name, value in kept.items() if value is not None and not name.startswith("_")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
