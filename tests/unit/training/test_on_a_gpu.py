"""Training as a card needs it: nothing of a failed attempt stays, and gradients keep to the range of float16."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from qmixlora.backbone.levers.host_memory import pinned_or_pageable
from qmixlora.mixlora import device_of
from qmixlora.out_of_memory import is_out_of_memory
from qmixlora.recipe import Recipe
from qmixlora.session import open_session
from qmixlora.training import arguments, make_trainer
from qmixlora.training.callbacks import MetricsLog, ProgressDisplay
from qmixlora.training.gradient_scale import GradientScale

from .helpers import QUIET, rows_of

MakeRecipe = Callable[..., Recipe]


def test_no_embedding_outlives_a_run_with_an_8_bit_optimizer(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(train={"optimizer": "adamw_8bit"}), [])
    embeddings = [weakref.ref(module) for module in session.model.modules() if isinstance(module, nn.Embedding)]
    assert embeddings
    make_trainer(session, rows_of(data, 4), None, tmp_path / "run", ProgressDisplay(QUIET)).train()
    del session
    gc.collect()
    assert not [embedding() for embedding in embeddings if embedding() is not None]


class OnTwoGpus(TrainingArguments):
    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 2


def test_of_several_gpus_one_is_trained_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "TrainingArguments", OnTwoGpus)
    made = arguments.arguments_of(make_recipe(), tmp_path / "run", False, 0)
    assert made.train_batch_size == made.per_device_train_batch_size


def test_the_peak_of_an_earlier_attempt_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    MetricsLog(tmp_path).on_train_begin(None, TrainerState(), None)
    assert resets == [1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed"), False),
    ],
)
def test_handles_that_find_no_memory_count_as_out_of_memory(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_memory_that_cannot_be_pinned_is_pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def unpinned(*shape: object, pin_memory: bool = False, **options: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    tensor = pinned_or_pageable([3, 4], torch.bfloat16)
    assert tensor.shape == (3, 4) and tensor.dtype == torch.bfloat16 and not tensor.is_pinned()


def test_a_model_with_weights_on_meta_computes_where_its_others_are() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)])
    assert device_of(model) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


TOKENS = 8000


class Narrow(nn.Module):
    """A trained fp32 layer under a frozen one in float16, whose output becomes a mean over many tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16, bias=False).half().requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        return 1e-3 * self.frozen(self.trained(states).half()).float().sum() / TOKENS


def gradient_of(model: Narrow, scaled: bool) -> Tensor:
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    loss = model(states)
    (GradientScale(model)(loss, torch.tensor(TOKENS)) if scaled else loss).backward()
    assert model.trained.weight.grad is not None
    return model.trained.weight.grad


def exact_gradient() -> Tensor:
    model = Narrow()
    model.frozen.float()
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    (1e-3 * model.frozen(model.trained(states)).sum() / TOKENS).backward()
    assert model.trained.weight.grad is not None
    return model.trained.weight.grad


def error_of(gradient: Tensor) -> float:
    return float((gradient - exact_gradient()).norm() / exact_gradient().norm())


def test_float16_loses_small_gradients_without_a_scale() -> None:
    assert error_of(gradient_of(Narrow(), scaled=False)) > 0.05


def test_a_scaled_loss_has_the_gradient_of_float32_up_to_rounding() -> None:
    assert error_of(gradient_of(Narrow(), scaled=True)) < 2e-3


def test_a_scaled_loss_is_the_loss() -> None:
    loss = torch.tensor(0.25, requires_grad=True)
    assert GradientScale(Narrow())(loss, 100).item() == 0.25


@pytest.mark.parametrize(("dtype", "scales"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_runs_in_float16_scale_their_gradients(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path, dtype: str, scales: bool
) -> None:
    session = open_session(make_recipe(model={"dtype": dtype}), [])
    made = make_trainer(session, rows_of(data, 4), None, tmp_path / "run", ProgressDisplay(QUIET))
    assert (made.gradient_scale is not None) is scales


def test_parameters_that_were_trained_in_float16_are_as_they_were_for_the_next_trainer(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    session = open_session(make_recipe(model={"dtype": "float16"}, train={"max_steps": 1}), [])
    trained = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
    for number in range(2):  # as an export polishes the adapters of one session, one after the other
        trainer = make_trainer(session, rows_of(data, 4), None, tmp_path / str(number), ProgressDisplay(QUIET))
        scale = trainer.gradient_scale
        trainer.train()
        assert scale.scale != 1, "it was used"
        assert not any(parameter._backward_hooks for parameter in trained)
