"""The guard of the first steps: a run that cannot work ends before it has cost anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from qmixlora import processes
from qmixlora.backbone import Anatomy, check_quantized
from qmixlora.data import Collator
from qmixlora.data.rendering.collate import MIXED
from qmixlora.errors import UserError
from qmixlora.mixlora import PEFT_PREFIX, is_adapter_parameter
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

from .finite import FiniteSteps

GUARDED_STEPS = 3  # B starts at zero, so A and the routers see no gradient on the first step
PATIENCE = 20  # steps with a gradient that is all zero, which can come by chance; one that is missing cannot


class FirstStepsGuard(TrainerCallback):
    """Stops a run that cannot work: wrong parts before the first step, a tensor without gradient after the third.

    A tensor is judged by steps since this start that ran its module, in any process: a projector runs where there are
    images. Routers may have a gradient of zero for long, since equal instructions leave nothing to route on.

    Raises UserError with the reason.
    """

    def __init__(self, session: TunedSession, finite: FiniteSteps) -> None:
        self.session, self.finite = session, finite
        self.waiting: dict[str, nn.Parameter] = {}
        self.owners: dict[str, nn.Module] = {}
        self.steps: Counter[str] = Counter()  # in which a waiting tensor's module ran
        self.in_graph: set[str] = set()  # those of which autograd knows
        self.ran: set[nn.Module] = set()  # in the step at hand
        self.hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.session.recipe.model.quantization == "nf4":
            check_quantized(
                self.session.backbone,
                self._bare_anatomy(),
                vision=self.session.recipe.model.quantize_vision == "nf4",
            )
        self._check_trainable()
        self.waiting = dict(self._trainable())
        self.owners = {name: self._owner(name) for name in self.waiting}
        for module in {*self.owners.values()}:
            # of what ran alone: a layer of a failed step must not hold the whole model
            self.hooks.append(module.register_forward_pre_hook(partial(_note, self.ran)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.waiting:
            return
        ran = processes.largest([self.owners[name] in self.ran for name in self.waiting])
        for (name, parameter), ran_anywhere in zip(list(self.waiting.items()), ran, strict=True):
            if not ran_anywhere or self.finite.in_a_row:  # such a step is skipped
                continue
            self.steps[name] += 1
            if parameter.grad is None:
                continue
            self.in_graph.add(name)
            if "_route_" in name or "mixlora_task" in name or bool(parameter.grad.any()):
                del self.waiting[name]
        self.ran.clear()
        if not self.waiting:
            self._remove_hooks()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dead = sorted(
            name for name in self.waiting if self.steps[name] >= (PATIENCE if name in self.in_graph else GUARDED_STEPS)
        )
        if dead:
            raise UserError(
                f"{len(dead)} of the trainable tensors had no gradient in the first {self.steps[dead[0]]} steps, "
                f"such as {dead[0]}.",
                where="adapter",
                fix="They cannot learn. Check adapter.target_modules, and adapter.projector.",
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def _owner(self, name: str) -> nn.Module:
        """The innermost module around a parameter that is run itself, no container of parameters."""
        path = name.rpartition(".")[0]
        while path and path != "base_model":  # PEFT runs past the tuner
            module = self.session.model.get_submodule(path)
            if not isinstance(module, nn.ParameterDict | nn.ModuleDict | nn.ParameterList | nn.ModuleList):
                return module
            path = path.rpartition(".")[0]
        return self.session.model

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.session.model.named_parameters() if p.requires_grad]

    def _bare_anatomy(self) -> Anatomy:
        """The anatomy with the names that adapted layers have inside the PEFT model."""
        anatomy, model = self.session.anatomy, self.session.backbone
        names = {name for name, _ in model.named_modules()}

        def bare(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{path}.base_layer" if f"{path}.base_layer" in names else path for path in paths)

        return replace(anatomy, targets=bare(anatomy.targets), wide=bare(anatomy.wide))

    def _check_trainable(self) -> None:
        anatomy, kind = self.session.anatomy, self.session.recipe.adapter.projector
        whole = anatomy.projectors if kind == "full" else ()
        low_rank = anatomy.projector_targets if kind == "lora" else ()
        for name, parameter in self._trainable():
            path = name.removeprefix(PEFT_PREFIX)
            is_adapter = is_adapter_parameter(name)
            is_projector = any(path.startswith(f"{module}.modules_to_save.") for module in whole)
            if not (is_adapter or is_projector):
                raise UserError(f"{path} is trainable, but the recipe does not say so.", where="adapter")
            in_vision = any(path.startswith(f"{vision}.") for vision in anatomy.vision)
            if is_adapter and in_vision and not path.startswith(tuple(f"{layer}." for layer in low_rank)):
                raise UserError(f"An adapter is on the vision tower: {path}.", where="adapter.target_modules")
            if parameter.dtype != torch.float32:
                raise UserError(f"{path} is trained in {parameter.dtype}, not in fp32.", where="adapter")


def check_has_images(recipe: Recipe, rows: Dataset) -> None:
    """Raise UserError if a projector is to be trained on rows of which none has an image."""
    kind = recipe.adapter.projector
    if kind != "frozen" and not any(len(images) for images in rows.select_columns(["images"])["images"]):
        raise UserError(
            f"None of the {len(rows)} samples has an image, so the projector cannot learn.",
            where=f"adapter.projector: {kind}",
            fix="Set adapter.projector=frozen, or check the data's images with `qmixlora data`.",
        )


def check_kinds(recipe: Recipe, collator: Collator, splits: Mapping[str, Dataset]) -> None:
    """Raise UserError if a batch of a split can have rows with and without images, which the model does not mix."""
    if collator.mixes:
        return
    spec = recipe.train
    of_training = ("train.micro_batch_size", spec.batch_tokens or spec.micro_batch_size)
    for split, rows in splits.items():
        is_train = split == "train"
        key, size = of_training if is_train else ("train.eval_batch_size", spec.eval_batch_size)
        if size > 1 and len({len(images) > 0 for images in rows.select_columns(["images"])["images"]}) > 1:
            more = " (with more train.gradient_accumulation, and without train.batch_tokens)" if is_train else ""
            fix = f"Set {key}=1{more}; or show images with every sample, or with none."
            raise UserError(MIXED, where=f"data.{split}", fix=fix)


def _note(ran: set[nn.Module], module: nn.Module, args: Any) -> None:
    if module.training:
        ran.add(module)
