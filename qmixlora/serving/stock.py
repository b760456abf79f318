"""Answers of an export by stock transformers and PEFT, in this process."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.image_utils import load_images

from qmixlora.device import make_room
from qmixlora.errors import UserError

from .fingerprint import Answer, Message, Step

OTHERS = 20  # likeliest tokens that are told beside the chosen one
LIBRARIES = ("torch", "transformers", "peft")
NAMES = ("first", "second")  # of adapters in PEFT, in turn: a folder's own may be one that torch modules have, or none


@dataclass
class StockModel:
    """A model with its processor, as stock libraries load them; `model` may be a PeftModel.

    `stops` are the tokens that generation stops at; `load` loads the model anew.
    """

    model: Any
    load: Callable[[], Any]
    processor: Any
    stops: list[int]
    template_arguments: Mapping[str, Any]

    def answer(self, messages: list[Message], max_tokens: int) -> Answer:
        """The greedy answer, without penalties, whatever the checkpoint's generation config says."""
        inputs = self.processor.apply_chat_template(
            [_for_transformers(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.template_arguments,
        )
        device, dtype = self.model.device, self.model.dtype
        inputs = {name: _moved(value, device, dtype) for name, value in inputs.items()}
        with torch.inference_mode(), _greedy(self.model, self.stops):
            made = self.model.generate(
                **inputs, max_new_tokens=max_tokens, return_dict_in_generate=True, output_logits=True
            )
        length = int(inputs["input_ids"].shape[1])
        tokens = made.sequences[0, -len(made.logits) :].tolist()
        steps = tuple(self._step(token, logits[0]) for token, logits in zip(tokens, made.logits, strict=True))
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(steps, text, length)

    def _step(self, token: int, logits_V: Tensor) -> Step:
        logprobs_V = logits_V.float().log_softmax(dim=-1)
        values, ids = logprobs_V.topk(min(OTHERS, len(logprobs_V)))
        text = self.processor.tokenizer.decode([token])
        others = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return Step(token, text, float(logprobs_V[token]), others)


def load_model(
    folder: str | Path,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> StockModel:
    """A model and its processor as stock transformers loads them; on a GPU, with the host for what does not fit it."""
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    place = {"device_map": "auto"} if torch.cuda.is_available() else {}

    def load() -> Any:
        make_room()
        kind = AutoModelForImageTextToText
        return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **place, **source).eval()

    model, processor = load(), AutoProcessor.from_pretrained(folder, **source)
    return StockModel(model, load, processor, _stops(model.generation_config), template_arguments or {})


def put_adapter(stock: StockModel, adapter: Path) -> None:
    """Put an adapter on the model, in place of one that is on it. Where it stops otherwise, so does the model."""
    if isinstance(stock.model, PeftModel) and is_offloaded(stock.model):
        stock.model = None  # its memory is free for the next one
        stock.model = stock.load()  # PEFT (0.21) puts the first adapter alone where the offloaded weights are
    model = stock.model
    if isinstance(model, PeftModel):
        [former] = model.peft_config
        name = next(name for name in NAMES if name != former)
        model.load_adapter(str(adapter), name)
        model.set_adapter(name)
        model.delete_adapter(former)
    else:
        stock.model = PeftModel.from_pretrained(model, str(adapter), adapter_name=NAMES[0]).eval()
    if (adapter / "generation_config.json").is_file():
        stock.stops = _stops(GenerationConfig.from_pretrained(str(adapter)))


@contextmanager
def clear_load_errors(what: str, where: str, fix: str = "") -> Iterator[None]:
    """Turn what transformers and PEFT raise for files that they cannot load into one clear message."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise UserError(f"{what}: {error}", where=where, fix=fix) from error


def is_offloaded(model: Any) -> bool:
    """Whether a model has weights that did not fit the GPU."""
    return not {"cpu", "disk"}.isdisjoint((getattr(model, "hf_device_map", None) or {}).values())


@contextmanager
def with_values(stock: StockModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters of the model other values for a block. Raises RuntimeError for one that is offloaded."""
    base = stock.model.get_base_model() if isinstance(stock.model, PeftModel) else stock.model
    own = {name: base.get_parameter(name) for name in values}
    if elsewhere := [name for name, parameter in own.items() if parameter.is_meta]:
        raise RuntimeError(f"{elsewhere[0]} does not fit the GPU")
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(before[name])


@contextmanager
def without_parts(stock: StockModel, parts: Sequence[str]) -> Iterator[None]:
    """Leave out, for a block, what the adapter has of these modules: their low-rank factors, or their own copies."""
    base = stock.model.get_base_model()
    own = [base.get_submodule(name) for name in parts]
    own = [module for module in own if hasattr(module, "enable_adapters")]
    for module in own:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in own:
            module.enable_adapters(True)


def versions() -> dict[str, str]:
    """The libraries that answers were made with."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@contextmanager
def _greedy(model: Any, stops: list[int]) -> Iterator[None]:
    """Put the checkpoint's generation config aside, of which transformers takes penalties even for greedy decoding."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    padding = own.pad_token_id if own.pad_token_id is not None else next(iter(stops), None)
    base.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=stops or None, pad_token_id=padding
    )
    try:
        yield
    finally:
        base.generation_config = own


def _stops(config: GenerationConfig) -> list[int]:
    token: Any = config.eos_token_id
    return [] if token is None else [token] if isinstance(token, int) else list(token)


def _for_transformers(message: Message) -> Message:
    """A message of OpenAI's protocol as chat templates of transformers take it, its images (PNG, RGB) decoded."""
    if isinstance(message["content"], str):
        return message
    parts = [
        part if part["type"] == "text" else {"type": "image", "image": load_images(part["image_url"]["url"])}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
