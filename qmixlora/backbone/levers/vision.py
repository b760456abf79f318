"""The vision tower taken out of a model, and image features in place of pixels.

Features are what the model's `get_image_features` gives: `pooler_output`, one entry (L x D) per image (or per tile of
one), and, where the family has them, `deepstack_features`, such a list for every layer that gets features of its own.
Batches carry them as `image_features`, and the model's forward, which calls `get_image_features` where there are
pixels, gets them there. (transformers 5.23 also takes them as `mm_encoder_outputs`; 5.17 does not.)

Shapes: L tokens of an image, D width of the decoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from qmixlora.errors import UserError

from ..anatomy import Anatomy

POOLED, DEEP = "pooler_output", "deepstack_features"
KNOWN = {POOLED, DEEP, "last_hidden_state", "hidden_states", "attentions"}  # the former two are what forwards read
FEATURES = "image_features"


def image_features(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """(pooled, deep) features of a batch's images, as the backbone (without PEFT around it) gives them to its own
    forward; None and an empty list where it has none, or others beside them. Raises UserError where it gives none.
    """
    body: Any = model.base_model
    if not hasattr(body, "get_image_features"):
        raise UserError(
            f"{type(model).__name__} gives no features of images.",
            where="train.cache_features",
            fix="Set train.cache_features: false.",
        )
    accepted = inspect.signature(body.get_image_features).parameters
    # what the forward fills in where it is not given, such as the layer of the tower
    own = {name: value for name, value in vars(model.config).items() if name in accepted and value is not None}
    output = body.get_image_features(**own, **{name: value for name, value in inputs.items() if name in accepted})
    if not KNOWN.issuperset(vars(output) if not isinstance(output, dict) else output):
        return None, []
    return getattr(output, POOLED, None), getattr(output, DEEP, None) or []


def use_features(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Take vision tower and projector out of a model, in place, and have its forward read `image_features`, the plain
    dictionary of a batch, where it would ask them for features. `model` is the backbone, without PEFT around it; it
    may be on the meta device.
    """
    paths = [*anatomy.vision, *anatomy.projectors]
    for path in paths:
        if not any(path.startswith(other + ".") for other in paths):
            model.set_submodule(path, _TakenOut())
    given: list[SimpleNamespace] = []  # for the batch that enters the model; the model takes it out

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        features = kwargs.pop(FEATURES, None)
        given.clear()
        if features is not None:
            given.append(_Features(**features))
            kwargs["pixel_values"] = torch.empty(1)  # there are pixels: the model looks no further
        return args, kwargs

    def get_image_features(*_: Any, **__: Any) -> SimpleNamespace:
        return given.pop()

    base: Any = model.base_model
    base.get_image_features = get_image_features
    model.register_forward_pre_hook(give, with_kwargs=True)


def take_out_vision(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Take the vision tower out of a model; return the features of a batch's images, the last that it made."""
    with torch.no_grad():
        pooled, deep = image_features(model, inputs)
    use_features(model, anatomy)
    return {POOLED: pooled, **({DEEP: deep} if deep else {})}


def in_place_of_images(inputs: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with features where its pixels were."""
    batch = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    return {**batch, FEATURES: features}


class _Features(SimpleNamespace):
    """Features as a `ModelOutput` gives them: a field that was not computed is None."""

    def __getattr__(self, name: str) -> None:
        return None


class _TakenOut(nn.Module):
    """Stands where the vision tower was. A model that calls it does not get its features by `get_image_features`."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "The model calls its vision tower itself, and takes no features in place of images.",
            where="train.cache_features",
            fix="Set train.cache_features: false.",
        )
