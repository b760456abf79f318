"""A variant: one class of models as a tiny random checkpoint with its real processor.

A file in `variants/` states the facts of one: sizes of the config, the processor, how the chat template writes turns.
Rows of NF4 layers are whole blocks of 64, which a CPU needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 384  # bytes, and up to 128 special tokens
ROPE = {"rope_type": "default", "rope_theta": 1e4}
Made = tuple[PretrainedConfig, Any]  # a config and its processor


@dataclass(frozen=True)
class Variant:
    """`make` gives the config and the processor from a tokenizer that knows the tokens which the processor asks for by
    name (`named`) and further `marks`.

    `template` is the processor's chat template. `refused` says which stages are refused, and by which words, where that
    is right: `{"load": "..."}` for a model that is refused before it is loaded.
    """

    make: Callable[[PreTrainedTokenizerFast], Made]
    template: str
    named: Mapping[str, str] = field(default_factory=dict)
    marks: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    bos: str = "<bos>"
    eos: str = "<eos>"
    adapter: Mapping[str, Any] = field(default_factory=dict)  # of recipes, where the default does not fit
    model: Mapping[str, Any] = field(default_factory=dict)

    def refusal_of(self, stage: str) -> str | None:
        """Words of the refusal that is right for a stage, if one is; a model that is not loaded is refused in all."""
        return self.refused.get("load") or self.refused.get(stage)

    def build(self) -> Made:
        """The config and the processor, with its chat template."""
        config, processor = self.make(tokenizer(self))
        processor.chat_template = self.template
        return config, processor


def variants() -> dict[str, Variant]:
    """Every variant by its file's name."""
    pytest.importorskip("transformers", minversion="5.23", reason="some variants are of families that are new there")
    package = importlib.import_module("tests.families.variants")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}").VARIANT for name in names}


def tokenizer(variant: Variant) -> PreTrainedTokenizerFast:
    """A token for every byte, and the special tokens of a variant."""
    special = dict.fromkeys(["<pad>", variant.bos, variant.eos, "<unk>", *variant.named.values(), *variant.marks])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, *special])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token=variant.bos,
        eos_token=variant.eos,
        unk_token="<unk>",
        extra_special_tokens=dict(variant.named),
        additional_special_tokens=list(variant.marks),
        model_max_length=10**6,
    )


def config_of(kind: str, tokens: PreTrainedTokenizerFast, **facts: Any) -> PretrainedConfig:
    """The config of a model type; what is not said is the class' own."""
    own = {"pad_token_id": tokens.pad_token_id, "bos_token_id": tokens.bos_token_id}
    config: PretrainedConfig = CONFIG_MAPPING[kind](**{**own, "eos_token_id": tokens.eos_token_id, **facts})
    return config


def text(kind: str = "", **more: Any) -> dict[str, Any]:
    """A small decoder."""
    facts = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": VOCABULARY, "rope_parameters": ROPE,
        "max_position_embeddings": 4096, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258, **more,
    }  # fmt: skip
    return {"model_type": kind, **facts} if kind else facts


def vision(kind: str = "", size: int = 28, patch: int = 7, **more: Any) -> dict[str, Any]:
    """A small image encoder."""
    facts = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": size, "patch_size": patch, **more,
    }  # fmt: skip
    return {"model_type": kind, **facts} if kind else facts


def template(
    image: str, user: str, assistant: str, end: str = "", *, turn_end: str = "", bos: str = "", printed: bool = False
) -> str:
    """A chat template: `image` stands for one, `user` and `assistant` before a turn, `end` after an answer, `turn_end`
    after a question. `printed`: it prints the content of all but questions as it is, as if it were a string.
    """
    begins = "{% if message['role'] != 'user' %}{{ message['content'] }}{% else %}" if printed else ""
    return (
        f"{bos}{{% for message in messages %}}"
        f"{{{{ {assistant!r} if message['role'] == 'assistant' else {user!r} }}}}"
        f"{begins}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{{{{ {image!r} }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{'{% endif %}' if printed else ''}"
        f"{{{{ {end!r} if message['role'] == 'assistant' else {turn_end!r} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{% endif %}}"
    )


def chatml(image: str) -> str:
    """Qwen's way, and that of many more."""
    end = "<|im_end|>\n"
    return template(image, "<|im_start|>user\n", "<|im_start|>assistant\n", end, turn_end=end)


CHATML = ("<|im_start|>", "<|im_end|>")
