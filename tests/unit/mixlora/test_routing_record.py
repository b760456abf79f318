"""The routing statistics of a run, and the record of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qmixlora.data import indices_by_task, load_split
from qmixlora.export.calibration import calibrate
from qmixlora.mixlora.routing_record import FILE, RoutingRecord, mixture_layers
from qmixlora.recipe import Recipe
from qmixlora.session import open_session
from qmixlora.training import make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay, RoutingLog

QUIET = Console(quiet=True)
LAYER = "model.language_model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
@pytest.mark.parametrize(
    "train_section",
    [
        {"micro_batch_size": 10, "gradient_accumulation": 1, "checkpointing": {"enabled": False}},
        {"micro_batch_size": 5, "gradient_accumulation": 2, "checkpointing": {"enabled": True}},
    ],
    ids=["whole batches", "accumulated, checkpointing"],
)
def test_training_counts_every_sample_once(
    make_recipe: Callable[..., Recipe], tmp_path: Path, train_section: dict[str, object], route_on: str
) -> None:
    """Whatever accumulation cuts and checkpointing computes again: the counts are those of the samples, and at a
    learning rate of nothing the means are those of a pass over the data.
    """
    adapter = {"route_on": route_on, "condition_norm": "none"}
    recipe = make_recipe(train={**train_section, "max_steps": 6, "learning_rate": 1e-12}, adapter=adapter)
    session = open_session(recipe, [])
    rows = load_split(recipe.data, "train")
    tasks = list(indices_by_task(rows))
    trainer = make_trainer(session, rows, None, tmp_path, ProgressDisplay(QUIET))
    log = RoutingLog(session.model, tasks, tmp_path)
    snapshots: list[tuple[int, dict[str, Tensor], Tensor]] = []
    add = log.record.add

    def watched(step: int, means: dict[str, Tensor], count_T: Tensor) -> None:
        snapshots.append((step, means, count_T))
        add(step, means, count_T)

    log.record.add = watched  # type: ignore[method-assign]
    trainer.add_callback(log)
    trainer.train()
    assert [step for step, _, _ in snapshots] == [1, 2, 3, 4, 5, 6]
    total_T = sum(count_T for _, _, count_T in snapshots)
    assert total_T.tolist() == [6.0] * 10  # one epoch: 60 samples in 6 steps of 10
    expected_LTEF = calibrate(session, rows, tasks)
    mean_TEF = sum(means[LAYER] * count_T[:, None, None] for _, means, count_T in snapshots) / total_T[:, None, None]
    expected_TEF = expected_LTEF[mixture_layers(session.model).index(LAYER)]
    torch.testing.assert_close(mean_TEF, expected_TEF.double(), atol=1e-5, rtol=0)


def test_training_leaves_no_hook_on_the_model(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    session = open_session(make_recipe(train={"max_steps": 1}), [])
    rows = load_split(session.recipe.data, "train")
    trainer = make_trainer(session, rows, None, tmp_path, ProgressDisplay(QUIET))
    trainer.add_callback(RoutingLog(session.model, list(indices_by_task(rows)), tmp_path))
    trainer.train()
    assert not session.model._forward_hooks


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from peft import get_peft_model
from qmixlora.mixlora import MixLoraConfig
from qmixlora.mixlora.routing_record import RoutingStatistics
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
config = MixLoraConfig(num_factors=4, r=2, route_on="all", target_modules=["0"])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config).eval()
batches, labels, selections = [torch.randn(1, 3, 8), torch.randn(2, 3, 8)], [["a"], ["a", "b"]], []
for batch in batches:
    model(batch)
    selections.append(model.base_model.last_selection()[0])
expected = torch.stack([(selections[0][0] + selections[1][0]) / 2, selections[1][1]])
statistics = RoutingStatistics(model, ["a", "b"])
model(batches[rank])
statistics.add(labels[rank])
statistics.save(folder)
torch.distributed.barrier()
resumed = RoutingStatistics(model, ["a", "b"])
resumed.load(folder)
for counted in (statistics, resumed):
    means, count_T = counted.take()
    assert count_T.tolist() == [2.0, 1.0], count_T
    torch.testing.assert_close(means["0"], expected)
    assert counted.take()[1].sum() == 0
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
def test_processes_count_together(tmp_path: Path) -> None:
    """Two processes with a sample each of task a, one with b: both see the mean over all three; a checkpoint too."""
    command = [sys.executable, "-c", TWO_PROCESSES]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in (0, 1)]
    for process in running:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error.decode()


@pytest.fixture(scope="module")
def recorded_run(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps, with a snapshot every 3 and a checkpoint every 15."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    values = {
        "model": {"id": str(backbone), "dtype": "float32"},
        "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0},
        "data": {"train": str(data / "train.json"), "max_length": 128},
        "train": {
            "output": str(folder),
            "max_steps": 30,
            "save_every": 15,
            "micro_batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 1e-2,
        },
    }
    return train(Recipe.model_validate(values), console=QUIET)


def test_training_leaves_a_record_of_ten_snapshots(recorded_run: Path) -> None:
    record = load_file(recorded_run / FILE)
    assert record["steps"].tolist() == list(range(3, 31, 3))
    assert record[f"{LAYER}.mean"].shape == (10, 4, 4) and record[f"{LAYER}.usage_A"].shape == (10, 10, 4)
    torch.testing.assert_close(record[f"{LAYER}.usage_A"].sum(dim=2), torch.ones(10, 10))
    torch.testing.assert_close(record[f"{LAYER}.mean"].sum(dim=(1, 2)), torch.full((10,), 2.0))  # R slots of mean 1
    assert (record["count"] > 0).all()


def test_the_record_has_tasks_and_layers_in_their_order(recorded_run: Path) -> None:
    with safe_open(recorded_run / FILE, "pt") as file:
        tasks, layers = (json.loads(file.metadata()[name]) for name in ("tasks", "layers"))
    assert len(tasks) == 10 and tasks == sorted(tasks)
    assert [name.rpartition(".")[2] for name in layers[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


def test_a_resumed_run_goes_on_with_the_record(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"save_every": 15, "max_steps": 30})
    folder = train(recipe, console=QUIET)
    whole = load_file(folder / FILE)
    (folder / "checkpoints" / "checkpoint-30" / "trainer_state.json").unlink()  # as if it had stopped before the end
    train(recipe, resume=True, console=QUIET)
    for key, tensor in load_file(folder / FILE).items():
        torch.testing.assert_close(tensor, whole[key], msg=key)


def test_samples_before_a_checkpoint_count_after_it(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"save_every": 20, "max_steps": 30})  # step 20 lies between the snapshots of 18 and 21
    folder = train(recipe, console=QUIET)
    whole = load_file(folder / FILE)
    (folder / "checkpoints" / "checkpoint-30").rename(folder / "elsewhere")
    train(recipe, resume=True, console=QUIET)
    again = load_file(folder / FILE)
    torch.testing.assert_close(again[f"{LAYER}.usage_A"], whole[f"{LAYER}.usage_A"])


@pytest.fixture
def record() -> RoutingRecord:
    """A snapshot of two tasks with four factors."""
    record = RoutingRecord(["s", "t"])
    apart = torch.stack([torch.diag(torch.tensor([2.0, 0, 0, 0])), torch.diag(torch.tensor([0.0, 1, 1, 0]))])
    record.add(10, {"q": apart}, torch.tensor([2.0, 4.0]))
    return record


def test_a_record_that_was_saved_is_loaded_as_it_was(record: RoutingRecord, tmp_path: Path) -> None:
    record.save(tmp_path / FILE)
    loaded = RoutingRecord(["s", "t"])
    loaded.load(tmp_path)
    assert loaded.steps == record.steps and torch.equal(loaded.count_T, record.count_T)
    assert torch.equal(loaded.means["q"], record.means["q"])
    assert all(torch.equal(loaded.usage[key][0], snapshots[0]) for key, snapshots in record.usage.items())


def test_a_task_without_samples_in_a_snapshot_keeps_its_previous_values(record: RoutingRecord) -> None:
    usage = {key: snapshots[-1].clone() for key, snapshots in record.usage.items()}
    record.add(15, {"q": torch.zeros(2, 4, 4)}, torch.tensor([0.0, 0.0]))
    assert record.count_T.tolist() == [2.0, 4.0] and record.means["q"][0, 0, 0] == 2.0
    assert all(torch.equal(snapshots[-1], usage[key]) for key, snapshots in record.usage.items())


def test_a_task_that_was_never_seen_has_an_even_usage() -> None:
    record = RoutingRecord(["s"])
    record.add(1, {"q": torch.zeros(1, 4, 4)}, torch.tensor([0.0]))
    assert record.usage["q.usage_A"][0].tolist() == [[0.25] * 4]
