"""The routing statistics of a run, and what the report reads off their record."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from qmixlora.data import indices_by_task, load_split, only_tasks
from qmixlora.errors import UserError
from qmixlora.export.calibration import calibrate
from qmixlora.mixlora.routing_record import FILE, RoutingRecord, RoutingStatistics
from qmixlora.recipe import Recipe
from qmixlora.report.figures import draw_interference, draw_routing
from qmixlora.report.routing import read_routing
from qmixlora.session import open_session
from qmixlora.training import make_trainer, train
from qmixlora.training.callbacks import ProgressDisplay, RoutingLog

LAYER = "model.language_model.layers.1.mlp.gate_proj"


def test_a_pass_gives_the_mean_of_what_each_sample_gets(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(train={"eval_batch_size": 7}), [])
    rows = load_split(session.recipe.data, "train")
    tasks = list(indices_by_task(rows))
    session.model.train()
    means, count_T = calibrate(session, rows, tasks)
    assert session.model.training and count_T.tolist() == [6.0] * 10 and len(means) == 14
    session.model.eval()
    layer = RoutingStatistics(session.model, tasks).layers[LAYER]
    for number, task in enumerate(tasks):
        mixes = []
        for row in only_tasks(rows, [task], "train"):
            session.model(**session.collator([row]))
            mixes.append(session.model.base_model.mixlora_routing.current.mixes[layer, "default"][0])
        torch.testing.assert_close(means[LAYER][number], torch.stack(mixes).mean(dim=0))


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
@pytest.mark.parametrize(
    "train_section",
    [
        {"micro_batch_size": 10, "gradient_accumulation": 1, "checkpointing": {"enabled": False}},
        {"micro_batch_size": 5, "gradient_accumulation": 2, "checkpointing": {"enabled": True}},
    ],
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
    trainer = make_trainer(session, rows, None, tmp_path, ProgressDisplay(Console(quiet=True)))
    log = RoutingLog(session.model, tasks, tmp_path)
    seen = []
    log.record.add = lambda step, means, count_T: seen.append((step, means, count_T))  # type: ignore[method-assign]
    log.record.save = lambda folder: None  # type: ignore[method-assign]
    trainer.add_callback(log)
    trainer.train()
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    total_T = sum(count_T for _, _, count_T in seen)
    assert total_T.tolist() == [6.0] * 10  # one epoch: 60 samples in 6 steps of 10
    expected, _ = calibrate(session, rows, tasks)
    mean = sum(means[LAYER] * count_T[:, None, None] for _, means, count_T in seen) / total_T[:, None, None]
    torch.testing.assert_close(mean, expected[LAYER].double(), atol=1e-5, rtol=0)
    assert not session.model._forward_hooks


def test_processes_count_together(tmp_path: Path) -> None:
    """Two processes with a sample each of task a, one with b: both see the mean over all three; a checkpoint too."""
    script = """
import sys, types, torch
from pathlib import Path
from qmixlora.statistics import RoutingStatistics
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def made():
    statistics = RoutingStatistics.__new__(RoutingStatistics)
    statistics.tasks, statistics.layers = ["a", "b"], {"q": None}
    statistics.sum_LTEF, statistics.count_T = torch.zeros(1, 2, 2, 2).double(), torch.zeros(2).double()
    return statistics
statistics = made()
statistics.mixes = lambda: torch.full((1, 1 + rank, 2, 2), 1.0 + rank)
statistics.add(["a"] if rank == 0 else ["a", "b"])
statistics.save(folder)
torch.distributed.barrier()
resumed = made()
resumed.load(folder)
for counted in (statistics, resumed):
    means, count_T = counted.take()
    assert count_T.tolist() == [2.0, 1.0], count_T
    assert means["q"][:, 0, 0].tolist() == [1.5, 2.0], means
    assert counted.take()[1].sum() == 0
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in (0, 1)]
    for process in running:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()


def test_training_leaves_a_record_and_resuming_goes_on_with_it(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"save_every": 15, "max_steps": 30})  # a look every 3 steps
    folder = train(recipe)
    whole = load_file(folder / FILE)
    with safe_open(folder / FILE, "pt") as file:
        tasks = json.loads(file.metadata()["tasks"])
    assert whole["steps"].tolist() == list(range(3, 31, 3))
    assert whole[f"{LAYER}.mean"].shape == (10, 4, 4) and whole[f"{LAYER}.usage_A"].shape == (10, 10, 4)
    torch.testing.assert_close(whole[f"{LAYER}.usage_A"].sum(dim=2), torch.ones(10, 10))
    torch.testing.assert_close(whole[f"{LAYER}.mean"].sum(dim=(1, 2)), torch.full((10,), 2.0))  # R slots of mean 1
    assert len(tasks) == 10 and (whole["count"] > 0).all()
    layers = read_routing(folder).layers  # in the order of the model
    assert [name.rpartition(".")[2] for name in layers[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip

    (folder / "checkpoints" / "checkpoint-30" / "trainer_state.json").unlink()  # as if it had stopped before the end
    train(recipe, resume=True)
    for key, tensor in load_file(folder / FILE).items():
        torch.testing.assert_close(tensor, whole[key], msg=key)


def test_samples_before_a_checkpoint_count_after_it(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"save_every": 20, "max_steps": 30})  # step 20 lies between the looks of 18 and 21
    folder = train(recipe)
    whole = load_file(folder / FILE)
    (folder / "checkpoints" / "checkpoint-30").rename(folder / "elsewhere")
    train(recipe, resume=True)
    again = load_file(folder / FILE)
    torch.testing.assert_close(again[f"{LAYER}.usage_A"], whole[f"{LAYER}.usage_A"])


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Two looks at two tasks with four factors: alike and even, then apart; factor 3 is never used."""
    even = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0])).expand(2, 4, 4)
    apart = torch.stack([torch.diag(torch.tensor([2.0, 0, 0, 0])), torch.diag(torch.tensor([0.0, 1, 1, 0]))])
    record = RoutingRecord(["s", "t"])
    record.add(5, {"model.layers.0.q": even}, torch.tensor([3.0, 3.0]))
    record.add(10, {"model.layers.0.q": apart}, torch.tensor([2.0, 4.0]))
    record.save(tmp_path)
    return tmp_path


def test_a_task_that_a_look_did_not_see_stands_as_before(record: Path) -> None:
    again = RoutingRecord(["s", "t"])
    again.load(record)
    before = {key: looks[-1].clone() for key, looks in again.usage.items()}
    again.add(15, {"model.layers.0.q": torch.zeros(2, 4, 4)}, torch.tensor([0.0, 0.0]))
    assert again.count_T.tolist() == [2.0, 4.0] and again.means["model.layers.0.q"][0, 0, 0] == 2.0
    assert all(torch.equal(looks[-1], before[key]) for key, looks in again.usage.items())
    fresh = RoutingRecord(["s"])
    fresh.add(1, {"q": torch.zeros(1, 4, 4)}, torch.tensor([0.0]))
    assert fresh.usage["q.usage_A"][0].tolist() == [[0.25] * 4]


def test_summary_by_hand(record: Path) -> None:
    summary = read_routing(record)
    assert summary.entropy()[0].tolist() == pytest.approx([0.0, 0.5])
    assert summary.dead()[0, 0].tolist() == [False, False, False, True]
    torch.testing.assert_close(summary.similarity(), torch.eye(2))
    assert summary.drift().tolist() == pytest.approx([(0.75 + 0.5) / 2])
    found = summary.to_dict()
    assert found["dead_factors"] == {"A": 1, "B": 1, "of": 4}
    assert found["drift"] == [{"step": 10, "moved": pytest.approx(0.625)}]


def test_pictures_are_drawn(record: Path) -> None:
    pictures = draw_routing(read_routing(record), record / "figures")
    pictures.append(
        draw_interference(["s", "t"], {"A": torch.eye(2), "B": -torch.eye(2)}, record / "figures" / "i.png")
    )
    for picture in pictures:
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(10**6) or ()) > 10, picture


def test_a_run_without_routing_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record of its routing"):
        read_routing(tmp_path)
