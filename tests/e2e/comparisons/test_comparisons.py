"""The comparisons of methods run at toy size, on the real data set and a stand-in for its language model."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import RealStandIn

from .conftest import Fresh

SPLITS = ("validation", "test", "paraphrased", "held_out", "conversations")


FACTORS = 14 * (16 + 16) * 64  # numbers in the pools of 14 layers, 64 wide
ADAPTERS = {
    "mixlora": FACTORS + 14 * 16 * 64,
    "random-routing": FACTORS,
    "pairing=shared_a": 14 * (4 + 16 + 4) * 64,  # A of rank 4, four experts and a score for each
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_leaves_its_scores_and_is_not_run_again(comparison: Any, fresh: Fresh, name: str) -> None:
    import tables
    from command_line import run_all
    from comparison import Run

    run = Run(name, comparison.methods[name], 1e-3, 0)
    run_all(comparison, [run])
    file = comparison.file_of(run)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert all(0 <= result[split]["mean"] <= 1 for split in SPLITS) and len(result["test"]) == 16
    parameters = fresh("mixlora")[0].model.named_parameters()
    projector = sum(p.numel() for parameter, p in parameters if "modules_to_save" in parameter)
    assert result["trainable_parameters"] == ADAPTERS[name] + projector
    written = file.stat().st_mtime_ns
    run_all(comparison, [run])
    assert file.stat().st_mtime_ns == written
    assert f"| {name} | 0.001 (0.001) | 0 |" in tables.summary(tables.read(comparison.results), [name])


def test_rows_made_once_are_batched_as_they_are_made_anew(comparison: Any, real_standin: RealStandIn) -> None:
    from prepared import PreparedCollator
    from transformers import AutoProcessor

    from qmixlora.data import Collator, load_conversations

    processor = AutoProcessor.from_pretrained(real_standin.model)
    rows = list(load_conversations(str(real_standin.data / "train.json")))
    once = PreparedCollator(processor, 1024)
    chosen = [0, 9, 27, len(rows) - 1]
    pictured = [index for index in chosen if rows[index]["images"]]
    ready = once.prepare(rows)
    for indices in (pictured, [index for index, row in enumerate(rows) if not row["images"]]):
        before, again = Collator(processor, 1024)([rows[i] for i in indices]), once([ready[i] for i in indices])
        assert before.keys() == again.keys()
        for key, value in before.items():
            assert value == again[key] if key == "tasks" else (value == again[key]).all()


def test_interference_and_routing_of_a_comparison_are_drawn_from_runs_that_are_kept(
    few_tasks: Any, tmp_path: Path
) -> None:
    import interference
    from comparison import best_run, trained

    trained(few_tasks, best_run(few_tasks, "mixlora"))
    adapter = few_tasks.folder_of(best_run(few_tasks, "mixlora")) / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    interference.draw(few_tasks, ("lora-r4", "mixlora"), tmp_path, tmp_path / "interference.png", tmp_path)
    assert adapter.stat().st_mtime_ns == written
    assert {path.name for path in tmp_path.iterdir()} == {
        "interference.png", "lora-r4.json", "mixlora.json",
        "routing-drift.png", "routing-tasks.png", "routing-usage.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "mixlora.json").read_text())["tasks"] == ["caption", "digit", "text"]


def test_how_alike_questions_are_routed_is_measured_on_runs_that_are_kept(few_tasks: Any) -> None:
    import wordings
    from comparison import best_run, trained

    result = wordings.measured(few_tasks, "mixlora", 0)
    assert result["other_words"].keys() == {"caption", "digit"}  # instructions without an image have one wording
    session = trained(few_tasks, best_run(few_tasks, "mixlora")).session
    gates = wordings.gates_of(session, few_tasks.make_data() / "train.json")  # of other splits it is one of each task
    own = wordings.alike(gates, gates)
    assert own.keys() == {"caption", "digit", "text"}
    assert 0 < wordings.between(gates) < min(own.values()) <= max(own.values()) <= 1


@pytest.mark.usefixtures("comparison")
def test_questions_are_compared_in_every_layer_and_never_with_themselves() -> None:
    import wordings

    one, other = torch.eye(4)[[0, 1]], torch.eye(4)[[0, 0]]  # N x E
    gates = {"a": torch.stack([one, other]), "b": torch.eye(4)[[3, 3]].expand(2, 2, 4)}
    assert wordings.alike(gates, gates) == {"a": 0.5, "b": 1.0}
    assert wordings.alike(gates, {"a": torch.stack([other, other])}) == {"a": 0.75}
    assert wordings.between(gates) == 0.0


@pytest.mark.parametrize("name", ["mixlora", pytest.param("fresh", marks=pytest.mark.long)])
def test_the_frontier_of_a_comparison_is_measured_on_its_runs(few_tasks: Any, name: str) -> None:
    import export

    result = export.execute(few_tasks, name, 0, (1,))
    assert result["exported"].keys() == {"0", "1"} and ("live" in result) == (name == "mixlora")
    assert result["exported"]["1"].keys() == {"mean", "caption", "digit", "text"}


def test_a_run_that_does_not_fit_the_budget_is_not_begun(comparison: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from command_line import run_all
    from comparison import Run

    kept = dataclasses.replace(comparison, results=comparison.results.with_name("kept"))
    kept.results.mkdir()
    run = Run("mixlora", kept.methods["mixlora"], 1e-3, 0)
    earlier = {"name": "lora-r16", "learning_rate": 1e-3, "train_seconds": 3000.0, "evaluation_seconds": 600.0}
    (kept.results / "lora-r16.json").write_text(json.dumps(earlier), encoding="utf-8")
    run_all(kept, [run], deadline=time.monotonic() + 3000)
    assert "not begun, it takes 60 min" in capsys.readouterr().out and not kept.file_of(run).exists()


def test_a_run_that_fails_does_not_keep_the_others_from_theirs(
    comparison: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import command_line as module

    def fails_once(comparison: Any, run: Any, deadline: float) -> dict[str, Any]:
        if run.seed == 0:
            raise ValueError("broken")
        return {"train_seconds": 1.0}

    monkeypatch.setattr(module, "execute", fails_once)
    kept = dataclasses.replace(comparison, results=comparison.results.with_name("after a failure"))
    runs = [module.Run("mixlora", kept.methods["mixlora"], 1e-3, seed) for seed in (0, 1)]
    with pytest.raises(SystemExit, match="1 failed: mixlora--lr0"):
        module.run_all(kept, runs)
    assert "ValueError: broken" in capsys.readouterr().out
    assert [kept.file_of(run).exists() for run in runs] == [False, True]


def test_a_run_of_another_backbone_is_trained_anew(few_tasks: Any) -> None:
    from comparison import best_run, trained

    run = best_run(few_tasks, "lora-r4")
    facts = few_tasks.folder_of(run) / "trained.json"
    backbone = trained(few_tasks, run).backbone
    told = json.loads(facts.read_text(encoding="utf-8"))
    facts.write_text(json.dumps({**told, "backbone": "another", "train_loss": -1.0}), encoding="utf-8")
    again = trained(few_tasks, run)
    assert again.train_loss > 0 and again.backbone == backbone != "another"
    assert json.loads(facts.read_text(encoding="utf-8"))["backbone"] == backbone


def test_a_run_of_unknown_length_is_given_up_in_its_first_steps(comparison: Any) -> None:
    from comparison import Run, execute
    from progress import OutOfTimeError

    with pytest.raises(OutOfTimeError, match="training, step"):
        execute(comparison, Run("gate=dense", comparison.methods["gate=dense"], 1e-3, 0), deadline=0.0)


@pytest.mark.usefixtures("comparison")
def test_a_phase_says_how_far_it_is_and_ends_where_it_would_not_end_in_time() -> None:
    from progress import OutOfTimeError, Phase

    now, said = [0.0], list[str]()

    def phase(deadline: float) -> Any:
        now[0] = 0.0
        return Phase("training, step", 400, deadline, said.append, lambda: now[0])

    in_time = phase(4000)
    for step in range(1, 401):
        now[0] = 10.0 * step
        in_time(step)
    assert len(said) == 10 and said[0] == "  training, step 40/400, 60.0 min left"
    late = phase(3000)
    now[0] = 190.0
    late(19)
    now[0] = 200.0
    with pytest.raises(OutOfTimeError, match="63 min more are needed, 47 are left"):
        late(20)


def kept_runs(name: str, tasks: dict[str, list[float]]) -> dict[float, list[dict[str, Any]]]:
    """Runs at one learning rate, one for each score of a task."""
    seeds = range(len(next(iter(tasks.values()))))
    scores = [{task: own[seed] for task, own in tasks.items()} for seed in seeds]
    splits = [{"mean": sum(own.values()) / len(own), **own} for own in scores]
    facts = {"name": name, "learning_rate": 1e-3, "trainable_parameters": 5000, "train_seconds": 1800.0}
    return {1e-3: [{**facts, "seed": seed, "validation": splits[seed], "test": splits[seed]} for seed in seeds]}


@pytest.mark.usefixtures("comparison")
def test_learning_rates_are_compared_on_the_seeds_that_all_of_them_have() -> None:
    import tables

    (two,) = kept_runs("mixlora", {"a": [0.84, 0.60]}).values()
    (better,) = kept_runs("mixlora", {"a": [0.90]}).values()
    (worse,) = kept_runs("mixlora", {"a": [0.80]}).values()
    assert tables.chosen({1e-3: two, 2e-3: better}) is better
    assert tables.chosen({1e-3: two, 2e-3: worse}) is two
    of_another_seed = [{**better[0], "seed": 7}]
    assert tables.chosen({1e-3: two, 2e-3: of_another_seed}) is two


@pytest.mark.usefixtures("comparison")
def test_a_table_pairs_methods_by_task_and_seed_and_leaves_out_what_was_not_run() -> None:
    import tables

    runs = {
        "lora-r16": kept_runs("lora-r16", {"a": [0.2, 0.3, 0.1], "b": [0.5, 0.6, 0.7]}),
        "mixlora": kept_runs("mixlora", {"a": [0.3, 0.4], "b": [0.6, 0.7]}),
        "arrow": kept_runs("arrow", {"a": [0.7], "b": [0.0]}),
    }
    names = ["lora-r16", "mixlora", "arrow", "gate=dense"]
    lines = tables.summary(runs, names, ("test", "held_out"), with_minutes=True).splitlines()
    assert lines[0].endswith("| minutes | validation | test | held-out tasks |") and len(lines) == 5
    assert lines[2] == "| lora-r16 | 0.001 (0.001) | 0, 1, 2 | 5 k | 30 | 0.400 ± 0.029 | 0.400 ± 0.029 | - |"
    assert lines[4] == "| arrow | 0.001 (0.001) | 0 | 5 k | 30 | 0.350 | 0.350 | - |"
    assert tables.differences(runs, names, ("test", "held_out")).splitlines()[2:] == [
        "| mixlora | 0, 1 | +10.0 (+10.0 to +10.0) | - |",
        "| arrow | 0 | +0.0 (-50.0 to +50.0) | - |",
    ]
