"""The command line plans memory: for a recipe with data, for a model by its name, with a probe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmixlora.recipe import Recipe
from tests.conftest import CommandLine

NAMED = ("--model", "llava-hf/llava-1.5-7b-hf", "--vram", 4, "--tokens", 700)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a probe keeps what it measured."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def probed(
    cache_folder: Path,
    make_recipe_in: Callable[..., Recipe],
    tmp_path_factory: pytest.TempPathFactory,
    qmixlora: CommandLine,
) -> dict[str, Any]:
    """The plan of the random backbone's recipe for a card, with a probe."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "recipe.yaml").write_text(make_recipe_in(folder).to_yaml(), encoding="utf-8")
    card = ("--card", "rtx3060-12gb", "--probe", "--json")
    done = qmixlora("plan", folder / "recipe.yaml", "train.max_steps=1", *card)
    assert done.code == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


@pytest.fixture(scope="module")
def too_large(qmixlora: CommandLine, cache_folder: Path) -> str:
    """The plan of a model by its name, for a card that is too small."""
    done = qmixlora("plan", "train.micro_batch_size=2", *NAMED)
    assert done.code == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_plan_is_of_the_worst_of_the_data_and_adds_up(probed: dict[str, Any]) -> None:
    assert "worst of the training data" in probed["batch"]["source"]
    assert probed["peak_gib"] == pytest.approx(sum(probed["parts"].values()))


@pytest.mark.long
def test_a_plan_says_how_much_of_the_card_is_left(probed: dict[str, Any]) -> None:
    assert probed["fits"] and probed["card_gib"] == pytest.approx(11.7)  # of 12, less what the driver keeps
    assert probed["margin_gib"] == pytest.approx(probed["card_gib"] - probed["peak_gib"])


def test_there_is_nothing_to_save_on_megabytes(probed: dict[str, Any]) -> None:
    assert probed["advice"] == []


def test_a_probe_measures_this_machine_and_is_kept(probed: dict[str, Any], cache_folder: Path) -> None:
    assert probed["probe"]["device"] == "cpu" and 0 < probed["probe"]["measured_gib"] < 0.1
    assert (cache_folder / "qmixlora" / "probes.json").is_file()


@pytest.mark.long
def test_a_model_by_its_name_is_planned_with_the_default_recipe_and_overrides(too_large: str) -> None:
    assert "NF4 weights" in too_large and "2 x 700 tokens" in too_large


@pytest.mark.long
def test_a_plan_that_does_not_fit_says_what_to_change(too_large: str) -> None:
    assert "does not fit" in too_large and "train.optimizer=paged_adamw_8bit" in too_large


def test_a_card_that_is_not_known_is_named(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("plan", recipe_file, "--card", "rtx9999")
    assert done.code == 2 and "no card 'rtx9999'" in done.stderr


def test_every_line_of_a_plan_fits_80_columns(too_large: str) -> None:
    assert [line for line in too_large.splitlines() if len(line) > 80] == []


def test_sizes_under_a_gib_are_in_mib(too_large: str) -> None:
    assert re.search(r"CUDA context and workspaces \(assumed\) +528 MiB", too_large)


def test_what_does_not_fit_with_one_edit_is_told_with_several(too_large: str) -> None:
    *_, together = too_large.partition("Together, and then it fits with ")
    overrides = [line.strip(" \\") for line in together.splitlines()[1:] if line.startswith("  ")]
    assert overrides and all("=" in override for override in overrides)


def test_evaluation_is_planned_and_says_how_many_samples_fit(too_large: str) -> None:
    assert "Evaluating 8 at a time (train.eval_batch_size): answers by generation" in too_large


def test_a_plan_for_data_that_cannot_be_measured_says_so(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path
) -> None:
    done = qmixlora("plan", recipe_file, "model.id=llava-hf/llava-1.5-7b-hf", "data.max_length=700", cwd=tmp_path)
    assert done.code == 0 and "The data was not measured:" in done.stdout and "made up" in done.stdout


@pytest.mark.long
def test_a_recipe_is_planned_for_its_card_and_for_the_gpu_at_hand(
    qmixlora: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmixlora.memory.card_at_hand", lambda: 6 * 2**30)
    done = qmixlora("plan", "llava-1.5-7b-rtx4060-8gb")
    assert "6.00 GiB free: it does not fit there" in done.stdout and "fits a card with 7.80 GiB" in done.stdout
    assert done.stdout.endswith("Next: qmixlora train llava-1.5-7b-rtx4060-8gb\n")
