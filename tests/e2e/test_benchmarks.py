"""What waits for a GPU runs here at toy size, so that no typo costs time on a card; predictions are written down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu.py"
DECLARED = json.loads((ROOT / "benchmarks" / "declared.json").read_text(encoding="utf-8"))


def gpu(*arguments: str, **options: Any) -> str:
    command = [sys.executable, "-W", "ignore", str(GPU), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def executed(step: str, folder: Path) -> Any:
    gpu("execute", step, "--toy", "--to", str(folder / "result.json"))
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["result"]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.long
def test_steps_that_are_done_are_skipped_and_those_over_the_budget_wait(tmp_path: Path) -> None:
    steps = ("--toy", "--to", str(tmp_path), "--only", "quantisers", "--only", "context")
    assert "quantisers: not started" in gpu("run", *steps, "--budget", "1")
    declared = tmp_path / "declared.json"  # what these results are judged by, whatever is declared later
    assert json.loads(declared.read_text(encoding="utf-8")) == DECLARED
    for done in (tmp_path / "context.json", declared):
        done.write_text("{}", encoding="utf-8")
    told = gpu("run", *steps, "--budget", "500")
    assert "quantisers" in told and "context" not in told and declared.read_text(encoding="utf-8") == "{}"
    result = json.loads((tmp_path / "quantisers.json").read_text(encoding="utf-8"))
    assert result["toy"] and result["result"]["float32"]["bytes_that_differ"] == 0


@pytest.mark.long
def test_every_declared_case_is_a_step_and_comes_after_the_shortest() -> None:
    steps = [line.split()[0] for line in gpu("list").splitlines()]
    assert steps[:3] == ["quantisers", "context", "levers"]
    assert {f"memory-{case['name']}" for case in DECLARED["cases"]} <= set(steps)


def test_predictions_are_declared_for_families_cards_and_levers() -> None:
    cases = DECLARED["cases"]
    assert len(cases) >= 16 and len({case["card"] for case in cases}) > 4
    assert {True, False} <= {case["runs"] for case in cases}


def assert_near(prediction: dict[str, Any], declared: dict[str, Any], within: float) -> None:
    sizes = {name: pytest.approx(declared[name], rel=within) for name in ("tensors", "process")}
    assert prediction == {**declared, **sizes}


@pytest.mark.long
def test_a_declared_prediction_is_todays(tmp_path: Path) -> None:
    declared = next(case for case in DECLARED["cases"] if case["name"] == "gemma-3-4b-peers")
    assert_near(executed("memory-gemma-3-4b-peers", tmp_path), declared, within=1e-2)  # other releases of torch


@pytest.mark.long
@pytest.mark.usefixtures("benchmarks")
def test_all_declared_predictions_are_todays() -> None:
    """A change that moves them declares them anew: `python benchmarks/memory.py declare`."""
    import memory

    again = json.loads(json.dumps([memory.prediction(case["name"]) for case in DECLARED["cases"]]))
    for one, declared in zip(again, DECLARED["cases"], strict=True):
        assert_near(one, declared, within=1e-3)


@pytest.mark.long
def test_the_demo_is_started_by_its_command(tmp_path: Path) -> None:
    result = executed("demo", tmp_path)
    assert result["exit"] == 0 and "demo [OPTIONS]" in result["told"]


@pytest.mark.exhaustive
def test_levers_are_compared_with_a_step_without_them(tmp_path: Path) -> None:
    results = executed("levers", tmp_path)
    same = [name for name, got in results.items() if got["to_the_bit"]]
    assert {"again", "streamed", "streamed, slow copies", "offloaded embeddings"} <= set(same)
    assert not results["nf4 head"]["to_the_bit"] and max(got["loss"] for got in results.values()) < 0.1


@pytest.mark.exhaustive
def test_the_ladder_says_what_it_changed_and_what_it_left(tmp_path: Path) -> None:
    results = executed("ladder", tmp_path)
    assert results["training"]["ended"] == results["loading"]["ended"] == "finished"


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", ["speed-batch-4", "speed-batch-4-compiled"])
def test_speed_is_measured_for_layer_and_step(step: str, tmp_path: Path) -> None:
    result = executed(step, tmp_path)
    assert result["layer"].keys() == result["step"].keys() == result["gpu_milliseconds"].keys()
    assert result["step"]["LoRA r=4"]["ratio"] == 1


def test_the_page_says_what_was_not_measured() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "not measured" in line]
    measured = len(list((ROOT / "benchmarks" / "results" / "gpu").glob("memory-*.json")))
    assert len([row for row in rows if "not seen" in row]) == len(DECLARED["cases"]) - measured


@pytest.mark.usefixtures("benchmarks")
def test_the_ladders_card_holds_the_model_and_not_a_whole_step() -> None:
    import on_gpu

    from qmixlora.memory import plan
    from qmixlora.memory.planner import CONTEXT, WORKSPACES
    from qmixlora.recipe import edited

    with on_gpu._data_and_model(toy=True, repeated=100) as recipe:
        planned = plan(edited(recipe, ["train.micro_batch_size=8", "train.gradient_accumulation=1"]), tokens=500)
    needed = planned.tensors + planned.parts.gaps + WORKSPACES
    assert planned.loading.card - CONTEXT < on_gpu.limit_of(planned, "training") < 0.9 * needed
    assert on_gpu.limit_of(planned, "loading") < planned.loading.card - CONTEXT


@pytest.mark.usefixtures("benchmarks")
def test_speed_is_measured_on_the_shapes_of_llava() -> None:
    import shapes

    from qmixlora.demo.backbone import processor_of
    from qmixlora.memory.architectures import config_of
    from qmixlora.recipe import Model

    ours = shapes.config_of(shapes.SIZES["7b"], processor_of(["a"]).tokenizer).text_config
    real = config_of(Model(id="llava-hf/llava-1.5-7b-hf")).text_config
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(ours, name) == getattr(real, name), name
    assert ours.head_dim == 128


def test_the_page_on_servers_has_what_is_kept(benchmarks: None, tmp_path: Path) -> None:
    import server_tables

    page = tmp_path / "serving.md"
    page.write_text(server_tables.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    server_tables.write_tables(page)
    assert page.read_text(encoding="utf-8") == server_tables.PAGE.read_text(encoding="utf-8")
