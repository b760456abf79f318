"""The anatomy of a model: its language model, vision tower and projector, found from the model itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qmixlora.errors import UserError


@dataclass(frozen=True)
class Anatomy:
    """Full module paths inside the model, so that nothing is matched by accident.

    `language` is the decoder (without lm_head); `vision` the image encoders; `projectors` the modules that map image
    features to the decoder's width; `targets` every linear layer of the decoder; `kept` the modules that are not
    quantised.
    """

    language: str
    vision: tuple[str, ...]
    projectors: tuple[str, ...]
    targets: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def layers(self) -> dict[str, list[str]]:
        """The decoder's layers by their paths, in the order of the model, with the linear layers in each."""
        layers: dict[str, list[str]] = {}
        for target in self.targets:
            match = re.match(re.escape(self.language) + r"\.\w+\.\d+(?=\.)", target)
            if match:
                layers.setdefault(match[0], []).append(target)
        return layers

    def in_first_layers(self, count: int) -> frozenset[str]:
        """The linear layers in the first `count` of the decoder's layers, which are those that are streamed."""
        return frozenset(path for paths in list(self.layers.values())[:count] for path in paths)


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Read the anatomy off a model (weights may be on meta).

    The decoder and the image encoder are what transformers' `get_decoder` and `get_encoder("image")` return. The
    projector is what stands beside them with parameters of its own; where nothing does (Qwen-VL keeps its mergers
    inside the vision tower), it is the children of the vision tower with a linear layer onto the decoder's width.

    Raises:
        UserError: the model has no separate decoder or image encoder.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    decoder, encoder = model.get_decoder(), _image_encoder(model)
    if decoder is None or decoder is model or id(decoder) not in paths or encoder is None:
        raise UserError(
            f"{type(model).__name__} has no decoder and image encoder of its own: it is no image-text-to-text model.",
            where="model.id",
            fix="Use a model that AutoModelForImageTextToText loads, such as llava-hf/llava-1.5-7b-hf.",
        )
    language, vision = paths[id(decoder)], paths[id(encoder)]
    projectors = _beside(model, language, vision) or _inside(encoder, vision, decoder)
    targets = tuple(f"{language}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear))
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    kept = (vision, *projectors, *(name for key, name in paths.items() if key in embeddings))
    return Anatomy(language, (vision,), projectors, targets, kept)


def _image_encoder(model: PreTrainedModel) -> nn.Module | None:
    encoder = model.get_encoder(modality="image")
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _beside(model: nn.Module, language: str, vision: str) -> tuple[str, ...]:
    """Modules with parameters that share a parent with the decoder or the encoder and are neither."""
    parents = {path.rpartition(".")[0] for path in (language, vision)}
    projectors = []
    for parent in sorted(parents):
        for name, child in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name
            on_the_way = any(part == path or part.startswith(path + ".") for part in (language, vision))
            is_head = parent == "" or name == "lm_head"
            if not on_the_way and not is_head and any(True for _ in child.parameters()):
                projectors.append(path)
    return tuple(projectors)


def _inside(encoder: nn.Module, vision: str, decoder: nn.Module) -> tuple[str, ...]:
    """Children of the encoder, outside its blocks, with a linear layer onto the decoder's width (lists are opened)."""
    width = decoder.get_input_embeddings().embedding_dim  # type: ignore[operator]
    projectors = []
    for name, child in encoder.named_children():
        if name.endswith(("blocks", "layers", "encoder")):
            continue
        parts = [(f"{name}.{index}", part) for index, part in child.named_children()]
        for path, part in parts if isinstance(child, nn.ModuleList) else [(name, child)]:
            if any(isinstance(layer, nn.Linear) and layer.out_features == width for layer in part.modules()):
                projectors.append(f"{vision}.{path}")
    return tuple(projectors)
