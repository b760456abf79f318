"""The page about the paper's experiment: its commands are those of the recipe, and the recipe is the paper's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from qmixlora.mixlora import MixLoraConfig
from qmixlora.recipe import load_recipe
from tests.conftest import CommandLine

RECIPE = "paper-llava-1.5-7b"
PAGE = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
TRAINED = [shlex.split(line)[1:] for line in re.findall(rf"^qmixlora train {RECIPE}.*$", PAGE, re.MULTILINE)]


@pytest.mark.parametrize("words", TRAINED, ids=lambda words: words[-1])
def test_every_run_of_the_page_resolves_and_has_a_folder_of_its_own(qmixlora: CommandLine, words: list[str]) -> None:
    done = qmixlora(*words, "--dry-run")
    assert done.code == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
    for override in words[2:]:
        path, value = override.split("=")
        section, key = path.split(".")
        assert resolved[section][key] == yaml.safe_load(value)
    outputs = [next((word for word in own if word.startswith("train.output=")), "") for own in TRAINED]
    assert len(set(outputs)) == len(TRAINED) == 6


WIDE = ("adapter.num_factors=64", "adapter.r=16", "adapter.alpha=32", "adapter.router=block")  # docs/method.md

SPARSE = ("adapter.r=4", "adapter.alpha=8")


@pytest.mark.parametrize(
    ("recipe", "overrides", "preset"),
    [
        (RECIPE, (), MixLoraConfig.paper()),
        (RECIPE, ("adapter.pairing=released", "adapter.alpha=32"), MixLoraConfig.released()),
        ("real-cpu", (), MixLoraConfig()),
        ("real-cpu", SPARSE, MixLoraConfig.sparse()),
        ("tiny-cpu", (), MixLoraConfig.sparse()),
        ("tiny-cpu", WIDE, MixLoraConfig.wide()),
    ],
)
def test_a_recipe_has_what_a_preset_has(recipe: str, overrides: tuple[str, ...], preset: MixLoraConfig) -> None:
    adapter = load_recipe(recipe, overrides).adapter
    for name in ("num_factors", "r", "alpha", "pairing", "gate", "route_on", "condition_norm", "router", "task_mix"):
        assert getattr(adapter, name) == getattr(preset, name), name
