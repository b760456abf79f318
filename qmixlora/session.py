"""A recipe to the parts of a run: the one assembly that training, evaluation, chat and export share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from . import processes
from .adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    check_same_settings,
    load_adapter,
    model_below,
    read_config,
    read_weights,
)
from .backbone import Anatomy, base_record, load_backbone, open_processor, tell_other_base
from .backbone.full_precision import train_in_fp32
from .backbone.image_tokens import limit_image_tokens
from .backbone.levers import shard_layers, without_levers
from .data import Collator, Conversation, image_tokens_of
from .device import default_device
from .errors import UserError, typed
from .manifest import check_unchanged, first_change
from .mixlora import PEFT_PREFIX, MixLoraConfig, device_of
from .mixlora.config import ends_in
from .out_of_memory import unless_out_of_memory
from .recipe import Adapter, Data, Model, Recipe, load_run_recipe

T = TypeVar("T")
NO_DATA = Data(train="none: this model has no recipe")


@dataclass(frozen=True)
class Session:
    """A model with its recipe, anatomy and collator. The model is whole: a base, or a merged checkpoint."""

    recipe: Recipe
    model: PreTrainedModel | PeftModel
    anatomy: Anatomy
    collator: Collator

    @property
    def backbone(self) -> PreTrainedModel:
        """The model without PEFT around it."""
        return backbone_of(self.model)

    @property
    def device(self) -> torch.device:
        """The device that batches go to. (`model.device` is the first parameter's, which may be the host.)"""
        return device_of(self.model)

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A collated batch with its tensors on the device."""
        device = self.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model in evaluation mode for a block, and back into the mode that it was in."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def without_adapter(self) -> AbstractContextManager[Any]:
        """A block in which the model is the bare backbone. Raises UserError, at once, if it has no adapter."""
        raise UserError(
            "This model has no adapter to leave out.", where=self.recipe.model.id, fix="Ask it as it is, as a whole."
        )

    def batches(self, rows: Sequence[Conversation]) -> Iterator[list[Conversation]]:
        """The rows in their order, `train.eval_batch_size` at a time; those without images apart, if need be."""
        size = self.recipe.train.eval_batch_size
        for start in range(0, len(rows), size):
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            yield from ([batch[index] for index in own] for own in self.collator.of_one_kind(batch))


@dataclass(frozen=True)
class TunedSession(Session):
    """A session whose model is a backbone with the recipe's adapter on it."""

    model: PeftModel

    def without_adapter(self) -> AbstractContextManager[Any]:
        """A block in which the model is the bare backbone."""
        return cast(AbstractContextManager[Any], self.model.disable_adapter())


def backbone_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A model without PEFT around it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def open_session(recipe: Recipe, tasks: Sequence[str]) -> TunedSession:
    """Load the backbone and put a fresh adapter on it; only the adapter (and projector) is trainable, in fp32.

    `tasks` are the labels in the training data, for adapters that route on them. The session's recipe says what the
    adapter is on (`model.learned_on`).

    Raises UserError as `load_backbone`; if no layer of the model matches `adapter.target_modules`; or if images cannot
    keep to `data.max_image_tokens`.
    """
    backbone, processor, anatomy = load_backbone(recipe.model, to_shard=processes.are_sharded())
    torch.manual_seed(recipe.train.seed)
    learned_on = {"learned_on": base_record(recipe.model, backbone.config, processor)}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=learned_on)})
    collator = _limited(recipe, processor, backbone)
    config = adapter_config(recipe.adapter, anatomy, tasks)
    if isinstance(config, MixLoraConfig):
        config.image_tokens, config.image_breaks = image_tokens_of(collator)
    session = TunedSession(recipe, with_fresh_adapter(recipe, backbone, config), anatomy, collator)
    if processes.are_sharded():
        shard_layers(backbone, list(anatomy.layers), default_device())
    return session


def open_collator(recipe: Recipe) -> Collator:
    """The collator of a recipe's sessions, without the model. Raises UserError as `open_processor`."""
    return make_collator(recipe, open_processor(recipe.model, recipe.data.max_image_tokens))


def open_run(folder: Path) -> Session:
    """Load a run or an export from its folder, for inference: its backbone, and its adapter exactly as it is.

    The folder is a run's (`recipe.yaml` and `adapter/`) or an exported adapter's (`adapter_config.json`), which give a
    `TunedSession`; or a model's (`config.json`): a merged checkpoint, which has the recipe of its run, or any other,
    whose recipe then has no data.

    Raises:
        UserError: the folder is none of these; its adapter does not fit the backbone key for key; or the files of the
            adapter are broken, or other than they were written. A recipe that is, is told on stderr.
    """
    recipe_file, adapter = folder / "recipe.yaml", folder / "adapter"
    if not (adapter / ADAPTER_WEIGHTS).is_file() and (folder / ADAPTER_WEIGHTS).is_file():
        adapter = folder
    is_model = (folder / "config.json").is_file()
    needed = [recipe_file, adapter / ADAPTER_WEIGHTS]
    if not is_model and (lacking := [_within(folder, file) for file in needed if not file.is_file()]):
        raise _cannot_be_opened(folder, lacking)
    recipe = load_run_recipe(folder) if recipe_file.is_file() else Recipe(model=Model(id=str(folder)), data=NO_DATA)
    if is_model:
        as_it_is = {"id": str(folder), "revision": None, "quantization": "none"}
        spec = without_levers(recipe.model).model_copy(update=as_it_is)
        return open_model(recipe.model_copy(update={"model": spec}))
    return _open_adapter(recipe, folder, adapter)


def _cannot_be_opened(folder: Path, lacking: Sequence[str]) -> UserError:
    """What a folder is that is not a finished run's, an export's or a model's, and what can be done with it."""
    if any(folder.glob("*.gguf")):
        ask = f"Ask llama-server, which loads it: `{typed('serve-files', folder.parent, '--for', 'llama-server')}`."
        return UserError("This export is a file for llama.cpp.", where=str(folder), fix=ask)
    if (folder / "history.jsonl").is_file() and not (folder / "adapter").is_dir():  # a damaged one has it
        go_on = f"Go on with it: `{typed('train', folder, '--resume')}`."
        return UserError("The run is not finished: it has no adapter yet.", where=str(folder), fix=go_on)
    return UserError(
        "This is not the folder of a finished run (recipe.yaml and adapter/), of an export, or of a model.",
        where=f"{folder}: there is no {' and no '.join(lacking)}",
        fix="Train a run with `qmixlora train RECIPE`, or name train.output of an earlier one.",
    )


def open_tuned_run(folder: Path) -> TunedSession:
    """Load as `open_run` does, with an adapter. Raises UserError as it does, and for the folder of a whole model."""
    session = open_run(folder)
    if not isinstance(session, TunedSession):
        raise UserError("This model has no adapter.", where=str(folder), fix="Name the folder of a run.")
    return session


def _open_adapter(recipe: Recipe, folder: Path, adapter: Path) -> TunedSession:
    config_file, weights_file = adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS
    config, weights = read_config(adapter), read_weights(adapter)
    if adapter != folder:  # an export has the recipe of its run, and an adapter of its own
        check_same_settings(config, recipe.adapter, str(config_file))
    check_unchanged(folder, [_within(folder, config_file)], "The adapter")
    recipe = recipe.model_copy(update={"model": model_below(adapter, recipe.model)})
    backbone, processor, anatomy = load_backbone(recipe.model)
    tell_other_base(recipe.model, base_record(recipe.model, backbone.config, processor), folder)
    collator = _limited(recipe, processor, backbone)
    model = with_fresh_adapter(recipe, backbone, config)
    load_adapter(model, weights, where=str(weights_file))
    check_unchanged(folder, [_within(folder, weights_file)], "The adapter")  # when what does not fit has been named
    if change := first_change(folder, ["recipe.yaml"]):
        print(f"{folder}: the recipe was changed since the run wrote it: {change}.", file=sys.stderr)
    return TunedSession(recipe, model.eval(), anatomy, collator)


def _within(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def open_model(recipe: Recipe) -> Session:
    """The recipe's model without any adapter, for inference, on the GPU if there is one.

    16-bit weights that do not fit it stay in host memory, and are on meta but while their layer computes.

    Raises UserError as `load_backbone`, or if images cannot keep to `data.max_image_tokens`.
    """
    model, anatomy, collator = _load(recipe, offload=True)
    return Session(recipe, model.eval(), anatomy, collator)


def with_whole_model(recipe: Recipe, work: Callable[[Session], T]) -> T:
    """The result of work on the recipe's model without any adapter, all of whose weights are there to be read, and to
    have an adapter put on: on the GPU, or on the CPU where the GPU has no memory for the model or for the work.

    Raises UserError as `open_model`.
    """

    def done(device: torch.device | None) -> tuple[T]:
        model, anatomy, collator = _load(recipe, device=device)
        return (work(Session(recipe, model.eval(), anatomy, collator)),)

    (result,) = unless_out_of_memory(lambda: done(None)) or done(torch.device("cpu"))
    return result


def _load(recipe: Recipe, **place: Any) -> tuple[PreTrainedModel, Anatomy, Collator]:
    """The recipe's backbone with its collator, images held to `data.max_image_tokens`; `place` as `load_backbone`."""
    backbone, processor, anatomy = load_backbone(recipe.model, **place)
    return backbone, anatomy, _limited(recipe, processor, backbone)


def _limited(recipe: Recipe, processor: ProcessorMixin, backbone: PreTrainedModel) -> Collator:
    """The collator with the processor of a backbone that was loaded, whose images are held to the recipe's limit."""
    limit_image_tokens(processor, backbone.config, recipe.data.max_image_tokens)
    return make_collator(recipe, processor)


def make_collator(recipe: Recipe, processor: ProcessorMixin) -> Collator:
    """The collator of a recipe's batches, with its model's processor."""
    spec, data = recipe.model, recipe.data
    dtype = getattr(torch, spec.dtype)
    return Collator(processor, data.max_length, spec.template_arguments, dtype, data.special_tokens)


def with_adapter(session: Session, adapter: Adapter, config: PeftConfig) -> TunedSession:
    """The session with a fresh adapter in place of its present one (if any), on the same backbone in memory.

    `adapter` is the recipe's section that goes with the `config`.
    """
    originals = {
        name.removeprefix(PEFT_PREFIX): module.original_module
        for name, module in session.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    backbone = session.model.unload() if isinstance(session.model, PeftModel) else session.model
    for name, module in originals.items():  # PEFT leaves the trained copy in their place
        backbone.set_submodule(name, module)
    recipe = session.recipe.model_copy(update={"adapter": adapter})
    return TunedSession(recipe, with_fresh_adapter(recipe, backbone, config), session.anatomy, session.collator)


def with_fresh_adapter(recipe: Recipe, backbone: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A backbone (which may be on meta) with a fresh adapter of this config on it, which alone is trainable, with the
    projector in fp32.
    """
    config.inference_mode = False
    config.base_model_name_or_path, config.revision = recipe.model.id, recipe.model.revision
    targets = set(config.target_modules or ())  # type: ignore[attr-defined]  # every method has them
    model = cast(PeftModel, get_peft_model(backbone, config))
    _check_adapted(model, targets, recipe)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                train_in_fp32(copy)
    return model


def _check_adapted(model: PeftModel, targets: set[str], recipe: Recipe) -> None:
    """Raise UserError unless the layers that were named are adapted, and no other: PEFT rewrites some names."""
    layers = {n for n, module in backbone_of(model).named_modules() if isinstance(module, BaseTunerLayer)}
    wrong = {name for name in layers if not any(ends_in(name, target) for target in targets)}
    missing = {target for target in targets if not any(ends_in(name, target) for name in layers)}
    if targets and (wrong or missing):
        raise UserError(
            f"PEFT adapts other layers of this kind of model than were named, such as {sorted(wrong | missing)[0]}.",
            where=f"model.id: {recipe.model.id}",
            fix="Set adapter.method: mixlora, or leave the experts' layers out of adapter.target_modules.",
        )
