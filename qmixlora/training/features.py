"""Pictures' features, computed once and kept on the disk, in place of the vision tower (`train.cache_features`).

A feature file holds what the model's `get_image_features` gives for one picture: `pooler_output` (tokens x width of the
decoder) and, where the family has them, `deepstack_features.0`, ... of the same shape, in the model's dtype. Training
hands them to the model as transformers' own generation does (`mm_encoder_outputs`).

Shapes: L tokens of a picture, D width of the decoder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qmixlora.backbone import Anatomy
from qmixlora.data import Collator
from qmixlora.data.formats import IMAGE
from qmixlora.errors import UserError
from qmixlora.evaluation.answers import evaluating, on_device
from qmixlora.recipe import Recipe
from qmixlora.session import Session

FOLDER = "features"
POOLED, DEEP = "pooler_output", "deepstack_features"


@dataclass
class FeatureStore:
    """Feature files in a folder, named by the picture's content and by all that decides its features."""

    folder: Path
    decided_by: str
    digests: dict[str, str] = field(default_factory=dict)  # of picture files, which do not change during a run

    def path(self, image: Mapping[str, Any]) -> Path:
        """The file of a picture (a row's `{"path", "bytes"}`); equal pictures have one."""
        if image["bytes"]:
            digest = hashlib.sha256(image["bytes"]).hexdigest()
        else:
            digest = self.digests.get(image["path"]) or hashlib.sha256(Path(image["path"]).read_bytes()).hexdigest()
            self.digests[image["path"]] = digest
        return self.folder / f"{hashlib.sha256((digest + self.decided_by).encode()).hexdigest()}.safetensors"

    def write(self, image: Mapping[str, Any], features: Mapping[str, Tensor], stacked: bool) -> None:
        """Keep a picture's features. `stacked`: the model wants those of several pictures as one tensor, not a list."""
        path = self.path(image)
        temporary = path.with_suffix(".tmp")
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in features.items()}
        save_file(held, temporary, {"stacked": json.dumps(stacked)})
        temporary.replace(path)

    def read(self, images: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The features of pictures, in their order, as the fields of the output that the model expects."""
        found: dict[str, list[Tensor]] = {}
        stacked = False
        for image in images:
            with safe_open(self.path(image), "pt") as file:
                stacked = json.loads(file.metadata()["stacked"])
                for name in sorted(file.keys()):
                    found.setdefault(name, []).append(file.get_tensor(name))
        pooled = found.pop(POOLED)
        deep = [found[f"{DEEP}.{index}"] for index in range(len(found))]
        return {POOLED: torch.stack(pooled) if stacked else pooled, **({DEEP: deep} if deep else {})}


@dataclass
class FeatureCollator(Collator):
    """A collator whose batches have `mm_encoder_outputs` in place of `pixel_values` and what goes with them.

    The outputs are plain dictionaries, `{"image": {"pooler_output": [L x D, ...]}}`, which a data loader can pin and
    move; `use_features` makes of them what the model reads.
    """

    store: FeatureStore = field(kw_only=True)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        images = [image for row in rows for image in row["images"]]
        return in_place_of_pictures(batch, self.store.read(images)) if images else batch


def with_cached_features(session: Session, splits: Sequence[Any], folder: Path, console: Console) -> Session:
    """The session with the features of all pictures of some splits on the disk, and without its vision tower.

    They lie in the run's `folder`; what lies there already is not computed again.

    Raises:
        UserError: the model takes no features in place of pictures, or gives other than one entry per picture; or the
            disk is too small.
    """
    base = session.model.get_base_model()
    if "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        raise _unfit(session.recipe, f"{type(base).__name__} takes no features in place of pictures.")
    store = FeatureStore(folder / FOLDER, _decided_by(session))
    store.folder.mkdir(parents=True, exist_ok=True)
    pictures = {store.path(image): image for rows in splits for images in rows["images"] for image in images}
    missing = [image for path, image in pictures.items() if not path.is_file()]
    console.print(f"Features of {len(pictures)} pictures: {len(missing)} to compute", highlight=False)
    size = session.recipe.train.eval_batch_size
    with torch.no_grad(), evaluating(session.model):
        for start in range(0, len(missing), size):
            compute(session, store, missing[start : start + size])
            if start == 0:
                _check_disk(store, missing, size)
    use_features(base, session.anatomy)
    given = {part.name: getattr(session.collator, part.name) for part in fields(session.collator)}
    return replace(session, collator=FeatureCollator(**given, store=store))


def use_features(model: nn.Module, anatomy: Anatomy) -> None:
    """Take vision tower and projector out of a model, in place, and have its forward accept the dictionaries of a
    `FeatureCollator`. `model` is the backbone, without PEFT around it; it may be on the meta device.
    """
    paths = [*anatomy.vision, *anatomy.projectors]
    for path in paths:
        if not any(path.startswith(other + ".") for other in paths):
            model.set_submodule(path, _TakenOut())

    def as_outputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        found = kwargs.get("mm_encoder_outputs")
        if found is not None:
            found = {kind: SimpleNamespace(**output) for kind, output in found.items()}
            kwargs = {**kwargs, "mm_encoder_outputs": found}
        return args, kwargs

    model.register_forward_pre_hook(as_outputs, with_kwargs=True)


class _TakenOut(nn.Module):
    """Stands where the vision tower was; torch refuses to call it."""


def compute(session: Session, store: FeatureStore, images: Sequence[Mapping[str, Any]]) -> None:
    """Write the features of some pictures, through the processor's and the model's own path.

    Raises UserError if the model gives other than one entry per picture.
    """
    base = session.model.get_base_model()
    turns = [{"role": "user", "text": f"{IMAGE}\n?"}, {"role": "assistant", "text": ""}]
    inputs = session.collator.prompts([{"turns": turns, "images": [image], "task": ""} for image in images])
    pooled, deep = image_features(base, on_device(inputs, session.device))
    if pooled is None or {len(images)} != {len(part) for part in (pooled, *deep)}:
        raise _unfit(session.recipe, "The model gives other than one entry of features per picture.")
    for index, image in enumerate(images):
        layers = {f"{DEEP}.{number}": part[index] for number, part in enumerate(deep)}
        store.write(image, {POOLED: pooled[index], **layers}, stacked=isinstance(pooled, Tensor))


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """(pooled, deep) features of a batch's pictures, as the backbone (without PEFT around it) gives them: one entry for
    each picture, and such a list for every layer that gets features of its own.
    """
    parts = (model, model.base_model)
    taken = {name for part in parts for name in inspect.signature(part.get_image_features).parameters}
    output = model.get_image_features(**{name: value for name, value in inputs.items() if name in taken})
    return getattr(output, POOLED, None), getattr(output, DEEP, None) or []


def take_out_vision(session: Session, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The features of a batch's pictures, the last that the session's vision tower makes: it is taken out."""
    base = session.model.get_base_model()
    with torch.no_grad():
        pooled, deep = image_features(base, inputs)
    use_features(base, session.anatomy)
    return {POOLED: pooled, **({DEEP: deep} if deep else {})}


def in_place_of_pictures(inputs: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with features where its pixels were."""
    batch = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
    return {**batch, "mm_encoder_outputs": {"image": features}}


def _decided_by(session: Session) -> str:
    """What decides a picture's features beside the picture."""
    model, processor = session.recipe.model, session.processor
    facts = model.model_dump(include={"id", "revision", "dtype", "attention"})
    vision = session.model.get_base_model().config.to_json_string()
    return json.dumps([facts, processor.image_processor.to_json_string(), vision], sort_keys=True)


def _check_disk(store: FeatureStore, missing: Sequence[Mapping[str, Any]], done: int) -> None:
    """Raises UserError if what is still missing would not fit, going by the pictures that are done."""
    sizes = [store.path(image).stat().st_size for image in missing[:done]]
    need = sum(sizes) / len(sizes) * (len(missing) - len(sizes))
    if need > shutil.disk_usage(store.folder).free:
        raise UserError(
            f"The features of {len(missing)} pictures take {need / 2**30:.1f} GiB, more than the disk has free.",
            where=str(store.folder.resolve()),
            fix="Put train.output on another disk, or set train.cache_features: false.",
        )


def _unfit(recipe: Recipe, what: str) -> UserError:
    return UserError(what, where=f"model.id: {recipe.model.id}", fix="Set train.cache_features: false.")
