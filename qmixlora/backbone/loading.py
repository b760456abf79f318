"""Load a backbone as the recipe says, tensor by tensor, and verify the result."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.logging import set_tqdm_hook

from qmixlora.bases import Source
from qmixlora.device import default_device, make_room
from qmixlora.errors import UserError
from qmixlora.progress import Tell, progress
from qmixlora.recipe import Model

from .anatomy import Anatomy
from .chat_templates import check_template, take_default
from .checks import check_cpu_rows, check_quantized, keep_cpu_weights_unpacked
from .completeness import check_complete
from .experts import use_own_forward
from .frozen import freeze
from .image_tokens import check_counting, limit_image_tokens
from .kinds import read_config
from .levers import apply_levers, check_levers, has_levers
from .prequantized import compute_in, own_quantization, quantized_already
from .quantizer import LoadingOutOfMemory, PlacedConfig, as_plain
from .skeleton import make_skeleton

KINDS = "mm_token_type_ids"  # which tokens are an image's


def load_backbone(
    spec: Model, *, offload: bool = False, device: torch.device | None = None, to_shard: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin, Anatomy]:
    """The frozen backbone, its processor and its anatomy; on `device` (the GPU if there is one, else the CPU).

    With `offload`, for inference alone, 16-bit weights that do not fit the GPU stay in host memory or on the disk
    (accelerate), unless the recipe itself places them (`apply_levers`). A model `to_shard` is left in host memory, its
    4-bit weights stored in `spec.dtype`; see `shard_layers`.

    With `quantization: nf4` every linear layer of the decoder is a bitsandbytes `Linear4bit` (NF4, double
    quantisation); vision tower, projector, embeddings and lm_head keep `spec.dtype`, unless the recipe says otherwise
    of the latter two. Experts held as one parameter are `NF4Experts`. Nothing is upcast. safetensors files only.

    Raises:
        UserError: the model cannot be found or read, is of another kind, is not quantised as declared, does not have
            the memory levers that the recipe pulls (`check_levers`), or has weights that its checkpoint lacks.
    """
    _check_folder(spec)
    source = source_of(spec)
    make_room()
    device = device or default_device()
    with _clear_errors(spec.id), _out_of_memory_shows(), _weights_counted(f"loading {Path(spec.id).name}"):
        config = read_config(spec, **source)
        skeleton, anatomy = make_skeleton(config, spec)
        check_levers(skeleton, anatomy, spec)
        processor = open_processor(spec, None)
        quantization = _quantization(config, spec, anatomy, device, to_shard)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            spec.id,
            dtype=getattr(torch, spec.dtype),
            quantization_config=quantization,
            attn_implementation=skeleton.config._attn_implementation,
            device_map={"": "cpu"} if to_shard else _device_map(offload, quantization, spec, device),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            **source,
        )
    model, report = loaded
    check_complete(model, anatomy, report, spec.id)
    _finish(model, anatomy, spec, device)
    return model, processor, anatomy


def source_of(spec: Model) -> dict[str, Any]:
    """The arguments with which `from_pretrained` takes a model; tells, once, if code of its repository may run."""
    return Source(spec.id, spec.revision, spec.trust_remote_code).arguments()


def open_processor(spec: Model, max_image_tokens: int | None) -> ProcessorMixin:
    """`load_processor`, for a run: it has a chat template. Raises UserError for whatever is wrong with it."""
    _check_folder(spec)
    with _clear_errors(spec.id):
        processor = load_processor(spec, max_image_tokens)
    check_template(processor, spec.id)
    return processor


def load_processor(spec: Model, max_image_tokens: int | None, config: PretrainedConfig | None = None) -> ProcessorMixin:
    """A model's processor without the model, its images held to a number of tokens as in a run.

    `config` is the model's, where it is not to be read from its folder or the hub.

    Raises:
        UserError: the images cannot be held to it, or the processor miscounts them.
        OSError, ValueError, ImportError: the processor cannot be loaded.
    """
    source = source_of(spec)
    processor: ProcessorMixin = AutoProcessor.from_pretrained(spec.id, **source)
    take_default(processor)
    config = AutoConfig.from_pretrained(spec.id, **source) if config is None else config
    if KINDS in _taken_by_forward(config):  # where the class does not ask for them itself (Cosmos 3 Edge)
        processor.return_mm_token_type_ids = True
    check_counting(processor, config, f"model.id: {spec.id}")
    if max_image_tokens is not None:
        limit_image_tokens(processor, config, max_image_tokens)
    return processor


def _taken_by_forward(config: PretrainedConfig) -> Container[str]:
    """The arguments of the forward of a config's model; none where transformers has no class for it."""
    kind: Any = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    return () if kind is None else inspect.signature(kind.forward).parameters


@contextmanager
def _out_of_memory_shows() -> Iterator[None]:
    """Raise torch.OutOfMemoryError where memory ran out inside transformers' loader.

    The loader (5.23) catches every Exception of a weight, goes on with the next, and in the end raises a RuntimeError
    without a cause: only the allocator's own count tells.
    """
    before = _times_out_of_memory()
    try:
        yield
    except LoadingOutOfMemory as error:
        raise torch.OutOfMemoryError(str(error)) from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _times_out_of_memory() == before:
            raise
        raise torch.OutOfMemoryError(f"CUDA out of memory while loading: {error}") from None


def _times_out_of_memory() -> int:
    return int(torch.cuda.memory_stats().get("num_ooms", 0)) if torch.cuda.is_initialized() else 0


@contextmanager
def _weights_counted(what: str) -> Iterator[None]:
    """Show how many weights are loaded, and quantised, in place of transformers' own bar."""
    with progress(what) as tell:

        def made(factory: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if not given or not named.get("desc", "").startswith("Loading"):
                return factory(*given, **named)
            return _told(given[0], tell)

        before = set_tqdm_hook(made)
        try:
            yield
        finally:
            set_tqdm_hook(before)


def _told(weights: Collection[Any], tell: Tell) -> Iterator[Any]:
    for done, weight in enumerate(weights):
        tell(done, len(weights))
        yield weight


@contextmanager
def _clear_errors(where: str) -> Iterator[None]:
    """Turn errors of reading a model into clear ones."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"The model needs a library that is not installed: {str(error).strip().splitlines()[0]}",
            where=f"model.id: {where}",
            fix="Install it; pip install 'qmixlora[vision]' brings torchvision and num2words, which most processors "
            "need.",
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"Cannot load the model: {error}",
            where=f"model.id: {where}",
            fix="Give a hub id (and be online once, or logged in if it is gated) or a local folder with config.json,"
            " safetensors weights and processor files.",
        ) from error


def _finish(model: PreTrainedModel, anatomy: Anatomy, spec: Model, device: torch.device) -> None:
    """Freeze the model, apply its levers, and check it."""
    freeze(model, anatomy)
    model.config.use_cache = True
    if isinstance(getattr(model.config, "quantization_config", None), PlacedConfig):
        as_plain(model)
    use_own_forward(model)
    if has_levers(spec):
        error = apply_levers(model, anatomy, spec, device)
        if error is not None:
            warnings.warn(f"The vision tower is held in {spec.quantize_vision}: {error}.", stacklevel=3)
    keep_cpu_weights_unpacked(model)
    compute_in(model, getattr(torch, spec.dtype))
    if spec.quantization == "nf4":
        check_quantized(model, anatomy, vision=spec.quantize_vision == "nf4")
    check_cpu_rows(model, spec.id)


def _check_folder(spec: Model) -> None:
    folder = Path(spec.id)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError("This folder holds no model (no config.json).", where=f"model.id: {spec.id}")


def _device_map(offload: bool, quantization: BitsAndBytesConfig | None, spec: Model, device: torch.device) -> Any:
    if quantization is not None and has_levers(spec):
        return {"": "cpu"}
    if offload and device.type == "cuda" and quantization is None and not has_levers(spec):
        return "auto"
    return {"": str(device)}


def _quantization(
    config: PretrainedConfig, spec: Model, anatomy: Anatomy, device: torch.device, to_shard: bool
) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    plain = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        # full paths: transformers matches from the start of the whole name, or as a suffix, never in the middle
        llm_int8_skip_modules=list(anatomy.kept),
        bnb_4bit_quant_storage=getattr(torch, spec.dtype) if to_shard else None,
    )
    if not has_levers(spec) and not to_shard and not anatomy.experts_in_nf4:
        return plain
    if own_quantization(config):
        raise quantized_already(config, spec)
    if to_shard and anatomy.experts_in_nf4:
        raise UserError(
            "FSDP cannot share out experts in NF4.",
            where="model.id",
            fix="Train without FSDP (each card then holds the whole model), or keep them in 16 bits (model.keep).",
        )
    on_host = anatomy.in_first_layers(len(anatomy.layers) if to_shard else spec.stream_layers)
    to_host = frozenset(f"{path}.weight" for path in on_host)
    return PlacedConfig(plain, device, to_host, frozenset(anatomy.experts_in_nf4))
