"""The routing record of a run, and what the report reads off it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from qmixlora.errors import UserError
from qmixlora.evaluation import only_task
from qmixlora.probe import FILE, RoutingProbe, RoutingRecord
from qmixlora.recipe import Recipe
from qmixlora.report.figures import draw_interference, draw_routing
from qmixlora.report.routing import read_routing
from qmixlora.session import open_session
from qmixlora.training import load_data, train


def test_a_look_is_the_mean_of_what_each_sample_gets(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(train={"eval_batch_size": 7}), [])
    rows = load_data(session.recipe.data, "train")
    probe = RoutingProbe(session, rows)
    session.model.train()
    means = probe.look()
    assert session.model.training and probe.tasks == sorted(set(rows["task"])) and len(means) == 14
    session.model.eval()
    layer = "model.language_model.layers.1.mlp.gate_proj"
    for number, task in enumerate(probe.tasks):
        mixes = []
        for row in only_task(rows, task, "train"):
            session.model(**session.collator([row]))
            mixes.append(session.model.base_model.mixlora_routing.current.mixes[probe.layers[layer], "default"][0])
        torch.testing.assert_close(means[layer][number], torch.stack(mixes).mean(dim=0))


def test_training_leaves_a_record_and_resuming_goes_on_with_it(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"save_every": 2})
    folder = train(recipe)
    with safe_open(folder / FILE, "pt") as file:
        tasks, whole = json.loads(file.metadata()["tasks"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layer = "model.language_model.layers.0.self_attn.q_proj"
    assert whole["steps"].tolist() == [0, 1, 2, 3, 4]
    assert whole[f"{layer}.mean"].shape == (10, 4, 4) and whole[f"{layer}.usage_A"].shape == (5, 10, 4)
    torch.testing.assert_close(whole[f"{layer}.usage_A"].sum(dim=2), torch.ones(5, 10))
    torch.testing.assert_close(
        whole[f"{layer}.mean"].sum(dim=(1, 2)), torch.full((10,), 2.0)
    )  # R slots of mean weight 1
    assert len(tasks) == 10
    layers = read_routing(folder).layers  # in the order of the model
    assert [name.rpartition(".")[2] for name in layers[:7]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]

    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()  # as if it had stopped before the end
    train(recipe, resume=True)
    with safe_open(folder / FILE, "pt") as file:
        for key, tensor in whole.items():
            torch.testing.assert_close(file.get_tensor(key), tensor, msg=key)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Two looks at two tasks with four factors: alike and even, then apart; factor 3 is never used."""
    even = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0])).expand(2, 4, 4)
    apart = torch.stack([torch.diag(torch.tensor([2.0, 0, 0, 0])), torch.diag(torch.tensor([0.0, 1, 1, 0]))])
    record = RoutingRecord(tmp_path / FILE)
    record.add(0, ["s", "t"], {"model.layers.0.q": even})
    record.add(10, ["s", "t"], {"model.layers.0.q": apart})
    return tmp_path


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
