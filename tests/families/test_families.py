"""Every variant goes through every stage; what is refused is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qmixlora.bases import own_base
from qmixlora.export.static import read

from .case import Case
from .outcomes import WORKS, outcomes
from .stages import STAGES, routing
from .table import DOCUMENT
from .variant import Variant, variants

VARIANTS = variants()
FAST = ("qwen3_vl", "smolvlm")  # of the ways of images: any shape, and tiles
LONG = (  # with them, one of each kind of decoder, tower and template
    "aria", "gemma3", "gemma4", "internvl", "llava", "mllama", "paligemma", "qwen3_5", "qwen3_vl_moe", *FAST,
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LONG else pytest.mark.exhaustive) for name in VARIANTS],
)
def test_every_stage_works_or_is_refused_by_name(name: str) -> None:
    variant = VARIANTS[name]
    told = outcomes(variant)
    expected = {stage: variant.refusal_of(stage) or WORKS for stage in STAGES}
    wrong = {stage: outcome for stage, outcome in told.items() if expected[stage] not in outcome}
    assert not wrong


@pytest.mark.parametrize("name", FAST)
def test_routed_on_are_the_words_of_the_instruction(name: str, tmp_path: Path) -> None:
    routing(Case(VARIANTS[name], tmp_path))


@pytest.mark.parametrize("stage", ["load", "labels", "look-ahead", "loss", "gradients"])
def test_a_stage_works_in_a_family(stage: str, tmp_path: Path) -> None:
    STAGES[stage](Case(VARIANTS["qwen3_vl"], tmp_path))


def test_a_projector_inside_the_vision_tower_learns_factors_that_the_base_of_its_exports_has(tmp_path: Path) -> None:
    case = Case(replace(VARIANTS["qwen3_vl"], adapter={"projector": "lora"}), tmp_path)
    STAGES["gradients"](case)
    STAGES["LoRA"](case)
    adapter = read(case.lora)
    assert adapter.updates.keys() == set(case.session.anatomy.targets) and not adapter.modules
    assert own_base(case.lora) is not None


def test_every_variant_has_its_row_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert not [name for name in VARIANTS if f"| {name} |" not in text]
    assert len(VARIANTS) >= 40


def test_a_variant_is_one_file_of_facts() -> None:
    assert all(isinstance(variant, Variant) for variant in VARIANTS.values())
