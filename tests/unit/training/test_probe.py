"""The probe: two steps of the run's own Trainer take what was planned."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import plan, planner
from qmixlora.memory.architectures import config_of
from qmixlora.memory.residuals import remembered
from qmixlora.memory.simulation.batch import worst_batches
from qmixlora.recipe import Recipe, edited
from qmixlora.training import probe as probe_module
from qmixlora.training.probe import PlannedBatch, peak_of, probe, reserved
from tests.backbones import save_llava
from tests.unit.memory.helpers import LLAVA_7B, in_fp32, recipe_of, small_gemma_4, small_qwen

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A LLaVA whose activations are megabytes: blocks of 512 bytes do not show."""
    return save_llava(tmp_path_factory.mktemp("wide"), processor, layers=4, width=256)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """torch's own kernels alone. oneDNN packs the factors of products into memory of its own, which it takes from the
    same allocator: how much depends on the processor (with AVX-512-BF16 or AMX, 3 % of a step in bf16).
    """
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize(
    ("adapter", "train", "model"),
    [
        ({}, {}, []),
        pytest.param({}, {"checkpointing": {"enabled": False}}, [], marks=pytest.mark.long),
        pytest.param({}, {"gradient_accumulation": 1, "loss_chunk": None}, [], marks=pytest.mark.long),
        pytest.param({"method": "lora", "r": 16}, {"optimizer": "paged_adamw_8bit"}, [], marks=pytest.mark.long),
        ({"pairing": "conditional", "gate": "straight_through", "route_on": "instruction"}, {}, []),
        pytest.param({"route_on": "task"}, {"checkpointing": {"every_n_layers": 2}}, [], marks=pytest.mark.long),
        ({}, {}, ["model.offload_embeddings=true", "model.stream_layers=3"]),
        pytest.param({}, {}, ["model.quantize_vision=nf4"], marks=pytest.mark.long),
        pytest.param({"projector": "lora"}, {}, ["model.quantize_vision=int8"], marks=pytest.mark.long),
        pytest.param({}, {"mlp_chunk": 128}, [], marks=pytest.mark.long),
        pytest.param({"projector": "frozen"}, {"cache_features": True}, [], marks=pytest.mark.long),
    ],
)
def test_a_probe_measures_what_was_planned(
    wide: Path, adapter: dict[str, Any], train: dict[str, Any], model: list[str]
) -> None:
    """Within 1 % of what torch's CPU allocator hands out."""
    recipe = in_fp32(recipe_of(str(wide), {"dropout": 0.0, **adapter}, **{"micro_batch_size": 3, **train}), *model)
    result = probe(recipe, plan(recipe, tokens=150))
    assert result.measured > 20 * 2**20
    assert result.planned == pytest.approx(result.measured, rel=0.01)


@pytest.mark.usefixtures("without_onednn")
def test_a_head_and_embeddings_in_one_table_are_planned_too(tmp_path: Path, processor: Any) -> None:
    save_llava(tmp_path, processor, layers=2, width=256, tied=True)
    recipe = in_fp32(recipe_of(str(tmp_path), {"dropout": 0.0}), "model.quantize_lm_head=int8")
    result = probe(recipe, plan(recipe, tokens=150))
    assert result.planned == pytest.approx(result.measured, rel=0.01)


@pytest.mark.long
@pytest.mark.usefixtures("without_onednn")
def test_a_table_of_per_layer_inputs_in_host_memory_is_planned_too(tmp_path: Path) -> None:
    """A small Gemma 4, whose table is most of it."""
    small_gemma_4().save_pretrained(tmp_path)
    recipe = in_fp32(recipe_of(str(tmp_path), {"dropout": 0.0}), "model.offload_embeddings=true")
    planned = plan(recipe, tokens=600)
    result = probe(recipe, planned)
    assert planned.host.embeddings == 20_000 * 3 * 64 * 4
    assert result.planned == pytest.approx(result.measured, rel=0.01)


@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize("pairing", ["tied", "conditional"])
def test_a_step_of_conversations_is_planned_too(
    wide: Path, data: Path, write_json: Callable[..., Path], pairing: str
) -> None:
    """Of the data at hand, whose longest samples have six segments and three."""
    image = str(next((data / "images").glob("train*.png")))
    turns = [{"from": "human", "value": "what is it ? " * 8}, {"from": "gpt", "value": "red " * 8}]
    rows = [{"image": image, "conversations": turns * count} for count in (6, 3, 1)]
    recipe = in_fp32(
        recipe_of(str(wide), {"dropout": 0.0, "pairing": pairing}, micro_batch_size=2),
        f"data.train={write_json('turns.json', rows)}", "data.max_length=1024", "data.allow_outside=true",
    )  # fmt: skip
    batch = worst_batches(recipe, config_of(recipe.model))[0]
    assert batch.inputs["segments"].amax(dim=1).tolist() == [5, 2]
    planned = plan(recipe, batch=batch)
    result = probe(recipe, planned)
    assert result.planned == pytest.approx(result.measured, rel=0.01)


@pytest.mark.usefixtures("without_onednn")
def test_a_bfloat16_step_is_planned_too(wide: Path) -> None:
    train = {"micro_batch_size": 2, "gradient_accumulation": 1, "optimizer": "paged_adamw_8bit"}
    recipe = recipe_of(str(wide), {"dropout": 0.0}, **train)
    result = probe(recipe, plan(recipe, tokens=80))
    assert result.planned == pytest.approx(result.measured, rel=0.01)


@pytest.mark.usefixtures("without_onednn")
def test_a_step_with_images_of_any_size_is_planned_too(tmp_path: Path) -> None:
    """A small Qwen2.5-VL, whose positions and windows are worked out from the image's size while it runs."""
    small_qwen(4).save_pretrained(tmp_path)
    # on a CPU a batch is copied nowhere: images are small here, so that their pixels make no difference
    recipe = in_fp32(recipe_of(str(tmp_path), {"dropout": 0.0}, micro_batch_size=2), "data.max_image_tokens=16")
    result = probe(recipe, plan(recipe, tokens=200))
    assert result.planned == pytest.approx(result.measured, rel=0.01)


@pytest.fixture
def small(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(train={"micro_batch_size": 2})


def test_a_probe_keeps_what_the_plan_missed(small: Recipe) -> None:
    result = probe(small, plan(small, tokens=40))
    assert remembered()["cpu"][small.model.id] == result.residual == result.measured - result.planned


def test_a_probe_that_runs_out_of_memory_says_what_was_planned(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("qmixlora.training.trainer.supervised_loss", too_small)
    planned = plan(small, tokens=40)
    with pytest.raises(UserError, match=f"planned were {planned.peak / GIB:.1f} GiB"):
        probe(small, planned)
    assert remembered() == {}


def test_measuring_leaves_the_garbage_collector_as_it_was() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    peak_of(lambda: None, nn.Linear(2, 2), CPU)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        peak_of(fails, nn.Linear(2, 2), CPU)
    assert gc.isenabled()


def test_the_peak_is_of_the_model_and_of_what_is_alive_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.uint8)  # one after another
        kept = [torch.empty(5000, dtype=torch.uint8) for _ in range(2)]
        del kept

    assert peak_of(work, nn.Linear(10, 10), CPU) == 110 * 4 + 2 * 5000


class Heavy:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.own = self
        self.bytes = torch.empty(2**20, dtype=torch.uint8)


def test_garbage_of_others_is_not_measured() -> None:
    """On a CPU, torch's profiler tells of what is freed only where it saw it made."""

    def work() -> None:
        gc.collect()
        torch.empty(5000, dtype=torch.uint8)

    heavy = Heavy()
    gc.collect()  # it is of the oldest generation now, which is not collected on the way
    del heavy
    assert peak_of(work, nn.Linear(10, 10), CPU) == 110 * 4 + 5000


def test_what_the_allocator_reserves_is_neither_the_context_nor_what_was_missed_before() -> None:
    recipe = recipe_of(LLAVA_7B)
    planned = plan(recipe, tokens=700)
    expected = planned.peak - planner.CONTEXT - planned.parts.routing_sums
    assert reserved(plan(recipe, tokens=700, residual=GIB)) == expected


def test_paged_states_lie_outside_the_allocator() -> None:
    recipe = edited(recipe_of(LLAVA_7B), ["train.optimizer=paged_adamw_8bit"])
    planned = plan(recipe, tokens=700)
    assert reserved(planned) == planned.peak - planner.CONTEXT - planned.parts.routing_sums - planned.paged


def test_a_planned_batch_is_what_it_was_made_of_whatever_the_rows() -> None:
    ids_BS = torch.ones(2, 3)
    batch = PlannedBatch({"input_ids": ids_BS})
    del batch([])["input_ids"]  # Trainer takes things out of a batch
    assert batch([{}, {}, {}])["input_ids"] is ids_BS  # type: ignore[list-item]


class OnACard(Tensor):
    """A tensor that does not lie on the host: the loader cannot pin it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            return out.as_subclass(Tensor) if func is Tensor.cpu else out


def test_cached_features_come_from_the_host_as_files_give_them(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_out = probe_module.take_out_vision

    def on_a_card(*arguments: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(OnACard), taken_out(*arguments))

    seen: list[Any] = []
    monkeypatch.setattr(probe_module, "take_out_vision", on_a_card)
    monkeypatch.setattr(probe_module, "_train", lambda session: seen.append(session.collator([])))
    recipe = in_fp32(recipe_of(str(wide), {"dropout": 0.0, "projector": "frozen"}, cache_features=True))
    probe(recipe, plan(recipe, tokens=80))
    assert [type(leaf) for leaf in tree_leaves(seen) if isinstance(leaf, Tensor)].count(OnACard) == 0


def test_streamed_layers_are_quantised_on_the_device_and_kept_on_the_host(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card quantises in seconds what takes a CPU minutes."""
    quantised: list[torch.device] = []
    made = probe_module.nf4_linear

    def recorded(weight: Tensor, bias: Tensor | None, device: torch.device) -> Any:
        quantised.append(device)
        return made(weight, bias, torch.device("cpu"))

    monkeypatch.setattr(probe_module, "nf4_linear", recorded)
    monkeypatch.setattr(probe_module, "_random", lambda tensor, device: torch.zeros(tensor.shape, dtype=tensor.dtype))
    monkeypatch.setattr(probe_module, "apply_levers", lambda *_: None)
    recipe = edited(in_fp32(recipe_of(str(wide))), ["model.stream_layers=3"])
    probe_module.random_backbone(config_of(recipe.model), recipe.model, torch.device("cpu", 0))
    assert len(quantised) == 4 * 7 and set(quantised) == {torch.device("cpu", 0)}
