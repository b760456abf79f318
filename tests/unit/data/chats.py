"""Real processors with tokenizers and chat templates of the kinds that released models have.

Tokenizers are of three kinds: byte-level BPE (Qwen, InternVL, SmolVLM), SentencePiece's BPE with a blank in front
(LLaMA) and without (Gemma); templates end answers with a token of their own, or with none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qmixlora.demo.backbone import make_processor
from tests.unit.backbone.image_tokens.families import MAKERS, PLACES

TEXT = ["what is the colour of the left circle? it is red, and the right one is blue.\n\n    def f(x): return x\n"] * 3
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen's
PARTS = "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}TEXT{% endif %}{% endfor %}"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    + PARTS.replace("TEXT", "{{ part.text }}")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (  # writes nothing after an answer
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ part.text + ' ' }}{% endgeneration %}{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (  # trims
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    + PARTS.replace("TEXT", "{{ part.text | trim }}")
    + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content and message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    + PARTS.replace("TEXT", "{{ part.text }}")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
THINKING = (  # thoughts of all but the last answer are left out, and the last one always has some
    "{% for message in messages %}{% set text = namespace(all='') %}"
    + PARTS.replace("IMAGE", "{% set text.all = text.all + '<start><image><end>' %}").replace(
        "TEXT", "{% set text.all = text.all + part.text %}"
    )
    + "{% set said = text.all.split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}"
    "{% set thought = text.all.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set thought = thought if '</think>' in text.all else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + said }}"
    "{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


class Chat(NamedTuple):
    """A family of models: whose processor, which tokenizer, template, and the token that ends an answer."""

    family: str
    tokens: str
    template: str
    end: str


CHATS = {
    "llava": Chat("llava", "llama", LLAVA, "</s>"),
    "llava_onevision": Chat("llava_onevision", "bytes", CHATML.replace("IMAGE", "<image>\n"), "<|im_end|>"),
    "qwen2_5_vl": Chat("qwen2_5_vl", "bytes", CHATML.replace("IMAGE", "<start><image><end>"), "<|im_end|>"),
    "qwen3_vl": Chat("qwen3_vl", "bytes", CHATML.replace("IMAGE", "<start><image><end>"), "<|im_end|>"),
    "gemma3": Chat("gemma3", "gemma", GEMMA.replace("IMAGE", "<image>"), "<end_of_turn>"),
    "internvl": Chat("internvl", "bytes", CHATML.replace("IMAGE", "<image>\n"), "<|im_end|>"),
    "idefics3": Chat("idefics3", "bytes", SMOLVLM.replace("IMAGE", "<image>"), "<end_of_utterance>"),
    "smolvlm": Chat("smolvlm", "bytes", SMOLVLM.replace("IMAGE", "<image>"), "<end_of_utterance>"),
}
THINKS = Chat("qwen3_vl", "bytes", THINKING, "<|im_end|>")
CONTROL = ["</s>", "<image>", "<|im_end|>", "<|im_start|>", "<end_of_turn>", "<end_of_utterance>", "<eos>", "<soft>"]


@cache
def processor_of(chat: Chat) -> Any:
    """The family's real processor, with this tokenizer and template."""
    processor = MAKERS[chat.family](TOKENIZERS[chat.tokens])[1]
    processor.chat_template = chat.template
    return processor


@cache
def embedded() -> Any:
    return make_processor()


def byte_level(special: dict[str, str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return _with(made, special, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def llama(special: dict[str, str]) -> PreTrainedTokenizerFast:
    made = _sentencepiece()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _with(made, special, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma(special: dict[str, str]) -> PreTrainedTokenizerFast:
    made = _sentencepiece()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_tokens([AddedToken("\n" * count, normalized=False) for count in range(1, 5)])
    return _with(made, special, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _sentencepiece() -> Tokenizer:
    """BPE over whole texts, with bytes for what it does not know: no words before it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    lines = [line for text in TEXT for line in text.splitlines()]  # a line's end is a byte to LLaMA
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    merges = [tuple(merge) for merge in state["merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def _with(made: Tokenizer, special: dict[str, str], **named: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=special, **named)
    more = ["<fake_token_around_image>", "<global-img>", *PLACES, "<start>", "<end>", *CONTROL]
    more = [token for token in more if token not in fast.get_vocab()]
    fast.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
    fast.add_tokens(["<think>", "</think>"])
    return fast


TOKENIZERS: dict[str, Callable[[dict[str, str]], PreTrainedTokenizerFast]] = {
    "bytes": byte_level,
    "llama": llama,
    "gemma": gemma,
}
