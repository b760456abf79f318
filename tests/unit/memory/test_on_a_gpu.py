"""Plans are made on machines with a GPU as on those without, and count what a card's kernels take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from qmixlora.device import GIB
from qmixlora.files import cache_folder
from qmixlora.memory import card_at_hand, plan, plan_with_advice
from qmixlora.memory.cards import CONTEXT
from qmixlora.memory.residuals import remember
from qmixlora.memory.simulation.account import Account
from qmixlora.memory.simulation.simulation import simulated
from qmixlora.recipe import edited
from qmixlora.training import adapt
from qmixlora.training.probe import reserved

from .helpers import LLAVA_7B, recipe_of

ROOT = Path(__file__).parents[3]
RECIPE = recipe_of(LLAVA_7B, micro_batch_size=2)
FEW_EDITS = edited(  # of which to plan
    RECIPE, ["train.optimizer=paged_adamw_8bit", "model.quantize_lm_head=nf4", "adapter.projector=frozen"]
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("pretended_gpu")
def test_edits_are_planned_in_forked_processes_that_ask_the_gpu_nothing() -> None:
    remember("NVIDIA GeForce RTX 4090", LLAVA_7B, GIB)
    advice = plan_with_advice(FEW_EDITS, tokens=700)
    assert advice.savings and advice.plan.parts.missed == GIB


@pytest.mark.long
@pytest.mark.usefixtures("pretended_gpu")
def test_a_run_that_ran_out_gets_the_edits_of_the_planner() -> None:
    assert adapt._planned(FEW_EDITS)


def test_a_planner_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a shape that nobody thought of")

    monkeypatch.setattr(adapt, "plan_with_advice", broken)
    with pytest.warns(UserWarning, match="a shape that nobody thought of"):
        assert adapt._planned(RECIPE) is None


def test_a_gpu_whose_probes_are_not_known_is_not_asked_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: int | None = None) -> str:
        raise AssertionError("a CUDA context for nothing")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", asked)
    assert plan_with_advice(FEW_EDITS, tokens=700).plan.parts.missed == 0


@pytest.mark.usefixtures("pretended_gpu")
def test_offloaded_activations_are_planned_without_pinned_memory() -> None:
    offloaded = plan(edited(RECIPE, ["train.checkpointing.offload=true"]), tokens=700)
    assert offloaded.host.activations > 0
    assert offloaded.parts.activations_saved < plan(RECIPE, tokens=700).parts.activations_saved


WITH_A_DEVICE = """
import warnings
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("npy")  # autograd starts a thread for it, as for a GPU
from qmixlora import parallel
from qmixlora.memory import plan_with_advice
from qmixlora.training import adapt
from tests.unit.memory.test_on_a_gpu import FEW_EDITS
forked, refused = parallel._forked, []
def noted(*arguments):
    try:
        return forked(*arguments)
    except parallel.ForkRefusedError as error:
        refused.append(error)
        raise
parallel._forked = noted
assert torch.accelerator.is_available()
first = plan_with_advice(FEW_EDITS, tokens=700).savings
assert first and not refused  # autograd ran in forked processes alone
torch.ones(1, requires_grad=True).sum().backward()
assert plan_with_advice(FEW_EDITS, tokens=700).savings == first and refused
warnings.simplefilter("error", UserWarning)
assert adapt._planned(FEW_EDITS)
"""


@pytest.mark.long
def test_edits_are_planned_where_autograd_has_threads_for_a_device() -> None:
    """It refuses to work in processes that are forked after its first backward pass, on whatever device that was. (In a
    process of its own: a device cannot be taken back.)
    """
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_DEVICE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'processors'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_dropout_keeps_a_mask_of_one_byte_per_number() -> None:
    states = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True)
    account = Account()
    with simulated([states], account):
        kept = functional.dropout(states, 0.1, True)
        assert account.live == 2**21 + 2**20
    assert kept.shape == states.shape


def test_torch_is_its_own_again_after_a_simulation() -> None:
    dropout, tensor = functional.dropout, torch.tensor
    with simulated([], Account()):
        assert functional.dropout is not dropout and torch.tensor is not tensor
    assert functional.dropout is dropout and torch.tensor is tensor


def test_plans_count_a_byte_where_torch_composes_dropout_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = edited(RECIPE, ["train.checkpointing.enabled=false", "adapter.dropout=0.05"])
    fused = plan(dense, tokens=700).parts.activations_saved
    ordinary = functional.dropout
    monkeypatch.setattr(torch, "native_dropout", lambda *arguments: (ordinary(*arguments), None))
    composed = plan(dense, tokens=700).parts.activations_saved
    assert composed - fused == 2 * 700 * 32 * (4096 * 3 + 11008)  # the inputs of q, k and v, o, gate and up, down


def test_only_large_parameters_have_paged_states() -> None:
    paged = plan(edited(RECIPE, ["train.optimizer=paged_adamw_8bit"]), tokens=700)
    assert 0 < paged.paged < paged.parts.optimizer
    assert reserved(paged) == paged.peak - paged.parts.routing_sums - paged.paged - GIB // 2
    assert plan(RECIPE, tokens=700).paged == 0


def test_the_routing_record_is_planned_for_every_task() -> None:
    one = plan(RECIPE, tokens=700)
    assert one.parts.routing_sums == 32 * 7 * 16 * 16 * 8
    assert plan(edited(RECIPE, ["adapter.method=lora"]), tokens=700).parts.routing_sums == 0


def test_the_gpu_at_hand_is_planned_with_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_at_hand() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GIB, 8 * GIB))
    assert card_at_hand() == 7 * GIB + CONTEXT, "to ask has made the context, which plans count themselves"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GIB - 2**20, 8 * GIB))
    assert card_at_hand() == 8 * GIB


def test_the_cache_of_residuals_is_the_tests_own(tmp_path: Path) -> None:
    remember("a card", LLAVA_7B, 5)
    assert json.loads((tmp_path / "qmixlora" / "probes.json").read_text()) == {"a card": {LLAVA_7B: 5}}
    assert cache_folder() == tmp_path / "qmixlora"
