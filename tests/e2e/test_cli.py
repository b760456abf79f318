"""The real command line, as a user runs it, on tiny real parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qmixlora.cli import main
from rich.console import Console

from qmixlora.export import merge
from qmixlora.recipe import Recipe
from qmixlora.training import train


def qmixlora(*arguments: object, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from qmixlora.cli.main import run; run()", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe().to_yaml(), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["mixlora", "lora"])
def test_train_evaluate_chat(recipe_file: Path, tmp_path: Path, data: Path, method: str) -> None:
    run = tmp_path / "run"
    done = qmixlora("train", recipe_file, f"adapter.method={method}")
    assert done.returncode == 0, done.stderr
    assert "step     4/4" in done.stdout
    for name in ("recipe.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (run / name).is_file(), name

    done = qmixlora("eval", run, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((run / "evaluation.json").read_text())
    assert result["split"] == "test" and len(result["tasks"]) == 10
    assert all(task.keys() == {"exact_match", "count"} for task in result["tasks"].values())
    mean = sum(task["exact_match"] for task in result["tasks"].values()) / 10
    assert result["mean_exact_match"] == pytest.approx(mean)

    done = qmixlora("eval", run, "--task", "digit", "--backbone")
    assert done.returncode == 0 and "digit" in done.stdout and "color" not in done.stdout
    done = qmixlora("eval", run, "--task", "juggling")
    assert done.returncode == 2 and "juggling" in done.stderr and "digit" in done.stderr

    done = qmixlora("inspect", run, "--interference", "--batches", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((run / "interference.json").read_text())
    assert len(found["tasks"]) == len(found["mean"]["A"]) == len(found["mean"]["B"][0]) == 10
    assert (run / "figures" / "interference.png").is_file()
    done = qmixlora("inspect", run, "--routing")
    if method == "lora":
        assert done.returncode == 2 and "no record of its routing" in done.stderr
    else:
        assert "entropy" in done.stdout and "Dead factors" in done.stdout, done.stderr
        assert len(list((run / "figures").glob("routing-*.png"))) == 3

    picture = next((data / "images").glob("test-*.png"))
    done = qmixlora("chat", run, "--image", picture, stdin="what digit is written ?\nhow big is the circle ?\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(">") == 3
    done = qmixlora("chat", run, "--image", tmp_path / "none.png", "--prompt", "what ?")
    assert done.returncode == 2 and "no such picture" in done.stderr


def test_exports_are_made_evaluated_and_talked_to(
    make_recipe: Callable[..., Recipe],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(make_recipe(), console=Console(quiet=True))
    done = qmixlora("export", run, "--task", "digit", "--as", "lora", "--as", "merged", "--polish", 2, "--json")
    assert done.returncode == 0, done.stderr
    for report, name in zip(json.loads(done.stdout), ("lora", "merged"), strict=True):
        folder = run / "exports" / f"digit-{name}"
        assert report == json.loads((folder / "fidelity.json").read_text()) and report["form"] == name
        done = qmixlora("eval", folder, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert list(result["tasks"]) == ["digit"]
        assert result["mean_exact_match"] == pytest.approx(report["exact_match"][name])
    picture = next((data / "images").glob("test-*.png"))
    done = qmixlora("chat", run / "exports" / "digit-merged", "--image", picture, "--prompt", "what digit is written ?")
    assert done.returncode == 0, done.stderr

    def called(*arguments: object) -> tuple[int, str]:
        """The same command line, in this process."""
        monkeypatch.setattr(sys, "argv", ["qmixlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main.run()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out + printed.err

    code, text = called("export", run, "--all", "--polish", 0)
    assert code == 0 and all(task in text for task in ("reading", "where", "mean", "update error")), text
    for arguments, words in (
        (("export", run), "--all"),
        (("export", run, "--task", "juggling"), "no task 'juggling'"),
        (("eval", run / "exports" / "digit-merged", "--backbone"), "no adapter to leave out"),
    ):
        code, text = called(*arguments)
        assert code == 2 and words in text and "Traceback" not in text
    monkeypatch.setattr(merge, "add_update", lambda weight, update: None)
    code, text = called("export", run, "--task", "digit", "--as", "merged", "--polish", 0)
    assert code == 1 and "does not compute what its adapter computes" in text


def test_plan(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where a probe keeps what it found
    done = qmixlora("plan", recipe_file, "train.max_steps=1", "--card", "rtx3060-12gb", "--probe", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "worst of the training data" in found["batch"]["source"]
    assert (tmp_path / "cache" / "qmixlora" / "probes.json").is_file()
    assert found["probe"]["device"] == "cpu" and 0 < found["probe"]["measured_gib"] < 0.1
    assert found["fits"] and found["card_gib"] == 12
    assert found["peak_gib"] == pytest.approx(sum(found["parts"].values()))
    assert found["margin_gib"] == pytest.approx(12 - found["peak_gib"])
    assert found["advice"] == []  # there is nothing to save on megabytes
    named = ["--model", "llava-hf/llava-1.5-7b-hf", "--vram", 4, "--tokens", 700]
    done = qmixlora("plan", "train.micro_batch_size=2", *named)
    assert done.returncode == 0 and "does not fit" in done.stdout and "NF4 weights" in done.stdout, done.stderr
    assert "train.optimizer=paged_adamw_8bit" in done.stdout and "2 x 700 tokens" in done.stdout
    done = qmixlora("plan", recipe_file, "--card", "rtx9999")
    assert done.returncode == 2 and "no card 'rtx9999'" in done.stderr


def test_resume_from_the_command_line(recipe_file: Path, tmp_path: Path) -> None:
    assert qmixlora("train", recipe_file, "train.save_every=2").returncode == 0
    done = qmixlora("train", recipe_file, "train.save_every=2", "train.max_steps=6", "--resume")
    assert done.returncode == 0, done.stderr
    assert "step     5/6" in done.stdout and "step     4/6" not in done.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.learning_rat=1"], ["Did you mean 'learning_rate'?"]),
        (["data.train=none.json"], ["no such data file", "none.json"]),
        (["model.id=/nowhere/model"], ["Cannot load the model", "/nowhere/model"]),
        (["adapter.target_modules=[w_proj]"], ["'w_proj'", "q_proj"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(
    recipe_file: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    done = qmixlora("train", recipe_file, *overrides)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.startswith("qmixlora: ")
    for word in [*words, "where:"]:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_nothing_that_looks_finished(recipe_file: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        done = qmixlora("train", recipe_file, f"train.output={small / 'run'}")
        assert done.returncode == 2, done.stderr
        assert "disk is full" in done.stderr and str(small) in done.stderr and "Traceback" not in done.stderr
        assert not (small / "run" / "adapter").exists() and not (small / "run" / "adapter.tmp").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_run_that_is_none_and_an_adapter_that_does_not_fit(recipe_file: Path, tmp_path: Path) -> None:
    done = qmixlora("eval", tmp_path)
    assert done.returncode == 2 and "not the folder of a finished run" in done.stderr
    assert qmixlora("train", recipe_file).returncode == 0
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    for damaged in (
        {key.replace("layers.1.", "layers.7."): value for key, value in tensors.items()},
        {key: value for key, value in tensors.items() if "layers.1." not in key},
    ):
        save_file(damaged, weights)
        done = qmixlora("eval", tmp_path / "run")
        assert done.returncode == 2 and "does not fit the backbone" in done.stderr


def test_the_other_verbs(recipe_file: Path, tmp_path: Path) -> None:
    listed = json.loads(qmixlora("recipes", "list", "--json").stdout)
    assert {row["name"] for row in listed} >= {"tiny-cpu"}
    assert qmixlora("recipes", "show", "tiny-cpu").stdout.startswith("# ")
    assert qmixlora("recipes", "copy", "tiny-cpu", tmp_path / "my.yaml").returncode == 0
    assert qmixlora("recipes", "copy", "tiny-cpu", tmp_path / "my.yaml").returncode == 2  # never overwritten
    assert qmixlora("recipes", "check", tmp_path / "my.yaml").returncode == 0
    (tmp_path / "my.yaml").write_text("model: {}")
    assert qmixlora("recipes", "check", tmp_path / "my.yaml").returncode == 1
    dry = qmixlora("train", recipe_file, "train.seed=7", "--dry-run")
    assert dry.returncode == 0 and "seed: 7" in dry.stdout and not (tmp_path / "run").exists()
    shown = qmixlora("inspect", recipe_file, "--samples", "1")
    assert shown.returncode == 0 and "[4 image tokens]" in shown.stdout, shown.stderr
    shown = qmixlora("inspect", recipe_file, "--samples", "2", "--json")
    assert [sample["task"] for sample in json.loads(shown.stdout)] == ["digit", "count"]
    found: list[dict[str, Any]] = json.loads(qmixlora("doctor", "--json").stdout)
    assert {"torch", "GPU", "NF4 (bitsandbytes)"} <= {row["what"] for row in found}
