"""The anatomy of a model: its language model, vision tower and projector, found from the model itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qmixlora.errors import UserError

from .experts import expert_parameters
from .nf4 import BLOCK
from .rewritten import rewritten_by_peft

# chooses the tokens that sparse attention reads, without a gradient; hidden states are cast to its weights' dtype
INDEXER = re.compile(r"\.indexer\.")
# keys and values of an image's states, and of latents that a key-value cache holds (multi-head latent attention)
BESIDE_TOKENS = re.compile(r"cross_?att(n|ention)\w*\.(k|v|kv|key|value)(_proj)?$|\.kv_b_proj$")
OTHERS = re.compile(r"audio|speech|video|generation|q_?former")  # names of what is no projector


@dataclass(frozen=True)
class Anatomy:
    """Full module paths inside the model, so that nothing is matched by accident.

    `language` is the decoder (without lm_head); `vision` the image encoders; `projectors` the modules that map image
    features to the decoder's width; `targets` every linear layer of the decoder; `kept` the modules that are not
    quantised; `others` what stands beside them (audio, a second tower, an image decoder), which is neither trained nor
    quantised; `projector_targets` the linear layers of the projectors. `experts` are the parameters of the decoder that
    hold several experts, which are quantised and not adapted. `wide` are the targets and experts that stay in 16 bits:
    indexers, and what a recipe keeps; `unadapted` the targets that are not adapted, since PEFT would adapt other
    parameters under their names or since no gradient reaches them.
    """

    language: str
    vision: tuple[str, ...]
    projectors: tuple[str, ...]
    targets: tuple[str, ...]
    kept: tuple[str, ...]
    others: tuple[str, ...] = ()
    projector_targets: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    unadapted: tuple[str, ...] = ()

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The targets that an adapter may be on."""
        return tuple(path for path in self.targets if path not in self.unadapted)

    @property
    def routable(self) -> tuple[str, ...]:
        """The targets that a mixture may be on: those that read the tokens of a forward pass, which are an instance's.

        Others read what one pass computes, or a cache holds, for all questions of a conversation.
        """
        return tuple(path for path in self.adaptable if not BESIDE_TOKENS.search(path))

    @property
    def in_nf4(self) -> tuple[str, ...]:
        """The targets that are quantised."""
        return tuple(path for path in self.targets if path not in self.wide)

    @property
    def experts_in_nf4(self) -> tuple[str, ...]:
        """The experts that are quantised."""
        return tuple(name for name in self.experts if name not in self.wide)

    def keeping(self, patterns: Sequence[str]) -> Anatomy:
        """The anatomy with the layers and experts in 16 bits that match one of the patterns (`model.keep`): the end of
        a path, or whole names in it, with the wildcards of a shell.

        Raises:
            UserError: a pattern matches nothing.
        """
        wide = []
        for pattern in patterns:
            forms = (pattern, f"*.{pattern}", f"*.{pattern}.*", f"{pattern}.*")
            matching = [p for p in (*self.targets, *self.experts) if any(fnmatchcase(p, form) for form in forms)]
            if not matching:
                kinds = sorted({path.rpartition(".")[2] for path in (*self.targets, *self.experts)})
                raise UserError(
                    f"No layer of the language model matches {pattern!r}.",
                    where="model.keep",
                    fix=f"Its layers are: {', '.join(kinds)}.",
                )
            wide += matching
        layers = tuple(path for path in wide if path in self.targets)
        return replace(self, kept=(*self.kept, *layers), wide=(*self.wide, *wide)) if wide else self

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
        first = frozenset(path for paths in list(self.layers.values())[:count] for path in paths)
        return first & frozenset(self.in_nf4)


def within(name: str, paths: Iterable[str]) -> bool:
    """Whether a module or a weight is one of these, or inside one of them."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Read the anatomy off a model (weights may be on meta).

    The decoder and the image encoder are what transformers' `get_decoder` and `get_encoder("image")` return; a decoder
    that has a decoder of its own is a causal model, whose head is left out. The projector is what stands beside them
    with parameters of its own and is no tower (`_beside`, `_is_other`); where nothing is (Qwen-VL keeps its mergers
    inside the vision tower), it is the children of the vision tower with a linear layer onto the decoder's width.

    A target computes as `nn.Linear` does: a router that is a subclass with another forward is none, and is kept. So is
    a layer that has no more weights than a block of NF4 (Gemma 3n clamps some of these in its forward).

    Raises:
        UserError: the model has no separate decoder or image encoder, or has the one inside the other.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    language, vision = _language_and_vision(model, paths)
    decoder, encoder = model.get_submodule(language), model.get_submodule(vision)
    head, width = _head(model, language), decoder.get_input_embeddings().embedding_dim  # type: ignore[operator]
    beside = _beside(model, language, vision, head)
    projectors = tuple(path for path in beside if not _is_other(path, model.get_submodule(path), width))
    if not projectors and not any("project" in path for path in beside):
        projectors = _inside(encoder, vision, width)
    linear = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    targets = {name for name, module in linear.items() if type(module).forward is nn.Linear.forward}
    targets -= {name for name, module in linear.items() if module.weight.numel() <= BLOCK}
    targets -= {name for name, module in linear.items() if module is head}
    embeddings = {id(model.get_input_embeddings()), id(head)}
    kept = [vision, *projectors, *(name for key, name in paths.items() if key in embeddings)]
    kept += [f"{language}.{name}" for name in linear if name not in targets and linear[name] is not head]
    others = tuple(path for path in beside if path not in projectors)
    paths_of_targets = tuple(f"{language}.{name}" for name in linear if name in targets)
    indexers = tuple(filter(INDEXER.search, paths_of_targets))
    return Anatomy(
        language,
        (vision,),
        projectors,
        paths_of_targets,
        (*kept, *others, *indexers),
        others,
        tuple(name for path in projectors for name in _plain_linears(path, model.get_submodule(path))),
        tuple(f"{language}.{name}" for name in expert_parameters(decoder)),
        wide=indexers,
        unadapted=(*rewritten_by_peft(model, paths_of_targets), *indexers),
    )


def _language_and_vision(model: PreTrainedModel, paths: dict[int, str]) -> tuple[str, str]:
    """The paths of the decoder and of the image encoder. Raises UserError as `find_anatomy`."""
    decoder, encoder = _decoder(model), _image_encoder(model)
    if decoder is None or id(decoder) not in paths or encoder is None:
        raise UserError(
            f"{type(model).__name__} has no decoder and image encoder of its own, which qmixlora tells apart: the "
            "one is quantised and adapted, the other is not.",
            where="model.id",
            fix="Use a model that has both, such as llava-hf/llava-1.5-7b-hf.",
        )
    language, vision = paths[id(decoder)], paths[id(encoder)]
    if vision.startswith(f"{language}."):
        raise UserError(
            f"{type(model).__name__} has its image encoder inside its decoder, so that the two cannot be told apart: "
            "the one is quantised and adapted, the other is not.",
            where="model.id",
            fix="Use a later model of the family, such as HuggingFaceM4/Idefics3-8B-Llama3.",
        )
    return language, vision


def _plain_linears(path: str, module: nn.Module) -> list[str]:
    """The linear layers in a module by their paths; none of a class of its own, whose weights a module around it may
    read itself.
    """
    layers = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    return [f"{path}.{name}".rstrip(".") for name in layers]


def _decoder(model: PreTrainedModel) -> PreTrainedModel | None:
    """The layers that generate, without a head. (Some models' `get_decoder` is a whole causal model.)"""
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder is model:
        return None
    if decoder.get_output_embeddings() is None:
        return decoder
    inner = decoder.get_decoder()
    inner = getattr(decoder, "model", None) if inner is decoder else inner  # where it does not know its own (Llama 4)
    return inner if isinstance(inner, PreTrainedModel) else decoder


def _image_encoder(model: PreTrainedModel) -> nn.Module | None:
    encoder = model.get_encoder(modality="image")
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _head(model: PreTrainedModel, language: str) -> Any:
    """What makes logits: the model's own head, or that of a causal model around the decoder (Nemotron-H Omni)."""
    parts = language.split(".")
    around = [model, *(model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))]
    heads = [part.get_output_embeddings() for part in around if isinstance(part, PreTrainedModel)]
    return next((head for head in heads if head is not None), None)


def _is_other(path: str, module: nn.Module, width: int) -> bool:
    """Whether a part beside the decoder is no projector: a model itself (a second tower, an audio encoder, an image
    decoder), or a part that serves one, by its name. A model that reads features and has a linear layer onto the
    decoder's width is a projector (Molmo 2).
    """
    if OTHERS.search(path.rpartition(".")[2]) is not None:
        return True
    return isinstance(module, PreTrainedModel) and (_reads_pixels(module) or not _maps_onto(module, width))


def _reads_pixels(module: nn.Module) -> bool:
    """Whether a module embeds patches, or their positions, as encoders of images do."""
    return any(isinstance(part, nn.modules.conv._ConvNd | nn.Embedding) for part in module.modules())


def _maps_onto(module: nn.Module, width: int) -> bool:
    return any(isinstance(part, nn.Linear) and part.out_features == width for part in module.modules())


def _beside(model: PreTrainedModel, language: str, vision: str, head: Any) -> tuple[str, ...]:
    """Modules with parameters that share a parent with the decoder or the encoder and are neither, nor the head; lists
    are opened.
    """
    parents = {path.rpartition(".")[0] for path in (language, vision)}
    beside = []
    for parent in sorted(parents):
        for name, child in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name
            on_the_way = within(language, [path]) or within(vision, [path])
            if on_the_way or _holds(child, head):
                continue
            parts = _opened(path, child)
            beside += [own for own, part in parts.items() if any(True for _ in part.parameters())]
    return tuple(beside)


def _holds(module: nn.Module, part: Any) -> bool:
    return any(child is part for child in module.modules())


def _opened(path: str, module: nn.Module) -> dict[str, nn.Module]:
    """A module by its path; of a list, its entries (PEFT trains no list as a whole)."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return {path: module}
    return {f"{path}.{name}": part for name, part in module.named_children()}


def _inside(encoder: nn.Module, vision: str, width: int) -> tuple[str, ...]:
    """Children of the encoder, outside its blocks, with a linear layer onto the decoder's width (lists are opened)."""
    projectors = []
    for name, child in encoder.named_children():
        if name.endswith(("blocks", "layers", "encoder")):
            continue
        for path, part in _opened(f"{vision}.{name}", child).items():
            if _maps_onto(part, width):
                projectors.append(path)
    return tuple(projectors)
