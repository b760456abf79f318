"""Image features, computed once and kept on the disk, in place of the vision tower (`train.cache_features`).

A feature file holds what the model's `get_image_features` gives for one image (see `backbone/levers/vision.py`):
`pooler_output` (L x D) and, where the family has them, `deepstack_features.0`, ... of the same shape, in the model's
dtype.

Shapes: L tokens of an image, D width of the decoder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qmixlora.backbone.levers import in_place_of_images, use_features
from qmixlora.backbone.levers.vision import DEEP, POOLED, image_features
from qmixlora.data import APPEARANCE_VERSION, Collator, Conversation, ImageFile, question_about
from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.files import replacing
from qmixlora.progress import progress
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

FOLDER = "features"
ROUNDING = 0.05  # of features, by their norm: in 16 bits, and of images that are computed together
UNKEPT = "The model gives other features of an image than can be kept."


@dataclass
class FeatureStore:
    """Feature files in a folder, named by the image's content and by all that decides its features."""

    folder: Path
    decided_by: str
    digests: dict[str, str] = field(default_factory=dict)  # of image files, which do not change during a run

    def path(self, image: ImageFile) -> Path:
        """The file of an image (a row's `{"path", "bytes"}`); equal images have one."""
        if image["bytes"]:
            digest = hashlib.sha256(image["bytes"]).hexdigest()
        else:
            source = str(image["path"])
            digest = self.digests.get(source) or hashlib.sha256(Path(source).read_bytes()).hexdigest()
            self.digests[source] = digest
        return self.folder / f"{hashlib.sha256((digest + self.decided_by).encode()).hexdigest()}.safetensors"

    def write(self, image: ImageFile, features: Mapping[str, Tensor], stacked: bool) -> None:
        """Keep an image's features. `stacked`: the model wants those of several images as one tensor, not a list."""
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in features.items()}
        with replacing(self.path(image)) as temporary:
            save_file(on_host, temporary, {"stacked": json.dumps(stacked)})

    def read(self, images: Iterable[ImageFile]) -> dict[str, Any]:
        """The features of images, in their order, as the fields of the output that the model expects."""
        tensors: dict[str, list[Tensor]] = {}
        stacked = False
        for image in images:
            with safe_open(self.path(image), "pt") as file:
                stacked = json.loads(file.metadata()["stacked"])
                for name in sorted(file.keys()):
                    tensors.setdefault(name, []).append(file.get_tensor(name))
        pooled = tensors.pop(POOLED)
        deep = [tensors[f"{DEEP}.{index}"] for index in range(len(tensors))]
        if stacked:  # an image is one entry, or one for each of its tiles
            return {POOLED: torch.cat([own if own.dim() > 2 else own[None] for own in pooled]), **_if_any(deep)}
        return {POOLED: pooled, **_if_any(deep)}


def _if_any(deep: list[list[Tensor]]) -> dict[str, Any]:
    return {DEEP: deep} if deep else {}


@dataclass
class FeatureCollator(Collator):
    """A collator whose batches have `image_features` in place of pixels.

    They are a plain dictionary, `{"pooler_output": [L x D, ...]}`, which a data loader can pin and move; `use_features`
    makes of it what the model reads.
    """

    store: FeatureStore = field(kw_only=True)

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        batch = super().__call__(rows)
        images = [image for row in rows for image in row["images"]]
        return in_place_of_images(batch, self.store.read(images)) if images else batch


def with_cached_features(
    session: TunedSession, splits: Sequence[Dataset], folder: Path, console: Console
) -> TunedSession:
    """The session with the features of all images of some splits on the disk, and without its vision tower.

    They lie in the run's `folder`; features that lie there already are not computed again.

    Raises:
        UserError: the model gives no features of images, or others than can be kept; or the disk is too small.
    """
    backbone, collator = session.backbone, session.collator
    store = FeatureStore(folder / FOLDER, _decided_by(session, collator))
    images = {store.path(image): image for rows in splits for own in rows["images"] for image in own}
    missing = [image for path, image in images.items() if not path.is_file()]
    console.print(f"Features of {len(images)} images: {len(missing)} to compute", highlight=False)
    size = session.recipe.train.eval_batch_size
    with torch.no_grad(), session.evaluating(), progress("features of images", console) as tell:
        if missing:
            _check_several(session, splits)
        for start in range(0, len(missing), size):
            compute(session, store, missing[start : start + size])
            if start == 0:
                _check_disk(store, missing, size)
            tell(min(start + size, len(missing)), len(missing))
    use_features(backbone, session.anatomy)
    given = {part.name: getattr(collator, part.name) for part in fields(collator)}
    return replace(session, collator=FeatureCollator(**given, store=store))


def _check_several(session: TunedSession, splits: Sequence[Dataset]) -> None:
    """Raise UserError if the images of the first row that shows several have other features together than each alone
    (LLaVA-OneVision cuts no tiles where there are several).
    """
    several = (own for rows in splits for own in rows.select_columns(["images"])["images"] if len(own) > 1)
    if (images := next(several, None)) is None:
        return
    alone, together = ([[image] for image in images], [images])
    parts = [torch.cat([_features_of(session, own) for own in shown]) for shown in (alone, together)]
    same = parts[0].shape == parts[1].shape and (parts[0] - parts[1]).norm() <= ROUNDING * parts[1].norm()
    if not same:
        raise _unfit(session.recipe, "The model gives other features of an image where a sample shows several.")


def _features_of(session: TunedSession, images: Sequence[ImageFile]) -> Tensor:
    """The features of a row's images, one after the other, in fp32. Raises UserError where there are none to keep."""
    pooled, _ = image_features(
        session.backbone, session.on_device(session.collator.prompts([question_about(images, "?")]))
    )
    if pooled is None:
        raise _unfit(session.recipe, UNKEPT)
    return torch.cat([own.reshape(-1, own.shape[-1]).float() for own in pooled])


def compute(session: TunedSession, store: FeatureStore, images: Sequence[ImageFile]) -> None:
    """Write the features of some images, made by the processor and the model as ever; one by one, where the model
    gives an entry for each tile of an image.

    Raises UserError if the model gives none, or others than it is known to read.
    """
    questions = [question_about([image], "?") for image in images]
    pooled, deep = image_features(session.backbone, session.on_device(session.collator.prompts(questions)))
    together = isinstance(pooled, Tensor) and pooled.dim() == 2  # of all images, one after the other
    if pooled is None or together or (deep and {len(images)} != {len(part) for part in (pooled, *deep)}):
        raise _unfit(session.recipe, UNKEPT)
    if len(pooled) != len(images) and len(images) > 1:
        for image in images:
            compute(session, store, [image])
        return
    if len(pooled) != len(images):
        tiles = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        store.write(images[0], {POOLED: tiles}, stacked=isinstance(pooled, Tensor))
        return
    for index, image in enumerate(images):
        layers = {f"{DEEP}.{number}": part[index] for number, part in enumerate(deep)}
        store.write(image, {POOLED: pooled[index], **layers}, stacked=isinstance(pooled, Tensor))


def _decided_by(session: TunedSession, collator: Collator) -> str:
    """Everything that decides an image's features beside the image."""
    facts = session.recipe.model.model_dump(include={"id", "revision", "dtype", "attention"})
    settings = collator.processor.image_processor.to_json_string()
    return json.dumps([APPEARANCE_VERSION, facts, settings, session.backbone.config.to_json_string()], sort_keys=True)


def _check_disk(store: FeatureStore, missing: Sequence[ImageFile], done: int) -> None:
    """Raises UserError if the features that are still missing would not fit, going by those of the images done."""
    sizes = [store.path(image).stat().st_size for image in missing[:done]]
    need = sum(sizes) / len(sizes) * (len(missing) - len(sizes))
    if need > shutil.disk_usage(store.folder).free:
        raise UserError(
            f"The features of {len(missing)} images take {need / GIB:.1f} GiB, more than the disk has free.",
            where=str(store.folder.resolve()),
            fix="Put train.output on another disk, or set train.cache_features: false.",
        )


def _unfit(recipe: Recipe, what: str) -> UserError:
    return UserError(
        what,
        where=f"model.id: {recipe.model.id}",
        fix="Set train.cache_features: false; or update transformers, whose newer releases do it for more families.",
    )
