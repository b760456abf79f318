"""The verbs that need no run: recipes and doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmixlora.recipe import shipped_recipes
from tests.conftest import CommandLine


@pytest.fixture
def copied(qmixlora: CommandLine, tmp_path: Path) -> Path:
    """A shipped recipe, copied."""
    assert qmixlora("recipes", "copy", "tiny-cpu", tmp_path / "my.yaml").code == 0
    return tmp_path / "my.yaml"


def test_the_shipped_recipes_are_listed(qmixlora: CommandLine) -> None:
    listed = json.loads(qmixlora("recipes", "list", "--json").stdout)
    assert {row["name"] for row in listed} >= {"tiny-cpu"}


def test_recipes_are_listed_one_in_a_line_by_card_and_family(qmixlora: CommandLine) -> None:
    done = qmixlora("recipes", "list", "--vram", "8", "--family", "Qwen")
    rows = [line.split() for line in done.stdout.splitlines() if "qwen" in line and "gb" in line]
    assert {row[0] for row in rows} == {
        name for name in shipped_recipes() if "qwen" in name and name.endswith(("-6gb", "-8gb"))
    }
    assert all(row[-1] == "GB" and float(row[-3]) < float(row[-2]) <= 8 for row in rows)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert qmixlora("recipes", "list", "--family", "gpt").code == 2


def test_the_command_alone_says_what_to_do_first(qmixlora: CommandLine) -> None:
    done = qmixlora()
    assert done.code == 0 and done.stderr == ""
    for line in done.stdout.splitlines():
        if line.startswith("  qmixlora"):
            assert qmixlora(line.split()[1], "--help").code == 0, line


def test_a_shipped_recipe_is_shown_as_it_is_copied(qmixlora: CommandLine, copied: Path) -> None:
    shown = qmixlora("recipes", "show", "tiny-cpu").stdout
    assert shown.startswith("# ") and shown == copied.read_text(encoding="utf-8")


def test_a_copy_overwrites_nothing(qmixlora: CommandLine, copied: Path) -> None:
    copied.write_text("mine", encoding="utf-8")
    assert qmixlora("recipes", "copy", "tiny-cpu", copied).code == 2
    assert copied.read_text(encoding="utf-8") == "mine"


def test_a_good_recipe_passes_the_check(qmixlora: CommandLine, copied: Path) -> None:
    assert qmixlora("recipes", "check", copied).code == 0


def test_a_bad_recipe_fails_the_check(qmixlora: CommandLine, copied: Path) -> None:
    copied.write_text("model: {}", encoding="utf-8")
    assert qmixlora("recipes", "check", copied).code == 1


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_recipe_that_is_named_after_a_card_is_planned(qmixlora: CommandLine, copied: Path, suffix: str) -> None:
    named = copied.rename(copied.with_name(f"own-rtx3050-6gb.{suffix}"))
    done = qmixlora("recipes", "check", named)
    assert done.code == 1 and "The file predicts nothing, the plan 0." in done.stdout


def test_the_doctor_examines_libraries_gpu_and_nf4(qmixlora: CommandLine) -> None:
    findings = json.loads(qmixlora("doctor", "--json").stdout)
    assert {"torch", "GPU", "NF4 (bitsandbytes)"} <= {row["what"] for row in findings}


def test_the_doctor_finds_a_package_that_is_not_there(qmixlora: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmixlora.doctor.PACKAGES", ("torch", "no-such-package"))
    done = qmixlora("doctor", "--json")
    [lacking] = [row for row in json.loads(done.stdout) if row["what"] == "no-such-package"]
    assert done.code == 1 and lacking["found"] == "not installed" and "pip install" in lacking["advice"]


def test_the_doctor_knows_the_models_and_data_that_are_made_here(
    qmixlora: CommandLine, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmixlora.demo.made_here.make_with_progress", lambda name, console: backbone)
    monkeypatch.setattr("qmixlora.demo.made_here.make_data", lambda name, folder: data)
    for name in ("embedded", "real"):
        looked = qmixlora("doctor", "--model", name)
        assert looked.code == 0 and f"Next: qmixlora new --model {name} --data DATA" in looked.stdout, looked.stderr
    measured = qmixlora("doctor", "--model", "embedded", "--nf4", "--data", "embedded", "--samples", 1, "--json")
    assert measured.code == 0, measured.stderr
    assert all(kind["outputs"] is not None for kind in json.loads(measured.stdout))
