"""The fidelity of an export: what it warns of, and what its file holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qmixlora.export.fidelity import ByLayer, Fidelity, Merging
from qmixlora.export.measurement import Measurement

METRICS = {"color": "exact"}


def made(
    live: float,
    polish_steps: int = 0,
    polish_tried: int | None = None,
    merging: Merging | None = None,
    split: str = "test",
    **scores: float,
) -> Fidelity:
    """The fidelity of an export with these scores, by form."""
    return Fidelity(
        folder=Path("run/exports/color-lora"),
        run=Path("run"),
        tasks={"color": 1.0},
        split=split,
        unmeasured=(),
        samples=2,
        rank=4,
        polish_steps=polish_steps,
        polish_tried=polish_steps if polish_tried is None else polish_tried,
        decided_on="validation",
        kept={"rank": ByLayer({"q": 0.5, "k": 1.0})},
        update_error=ByLayer({"q": 0.1, "k": 0.3}),
        live=Measurement(live, 1.0, ["a", "b"], METRICS),
        measurements={form: Measurement(score, 1.5, ["a", "c"], METRICS) for form, score in scores.items()},
        projector="base",
        in_nf4=True,
        merging=merging,
        versions={"torch": "2"},
    )


def test_an_export_that_keeps_95_percent_is_not_warned_of() -> None:
    assert made(0.8, lora=0.76).warnings == []


def test_an_export_that_keeps_less_is_warned_of_with_its_numbers() -> None:
    (warning,) = made(0.8, lora=0.75).warnings
    assert warning.startswith("color-lora scores 0.750, the live model 0.800 (split test)")


@pytest.mark.parametrize(("polish_steps", "longer"), [(0, "--polish 200"), (150, "--polish 300")])
def test_the_advice_is_to_polish_or_to_polish_longer(polish_steps: int, longer: str) -> None:
    (warning,) = made(0.8, lora=0.5, polish_steps=polish_steps).warnings
    assert longer in warning


def test_one_adapter_for_several_tasks_is_warned_of_with_the_advice_to_export_each() -> None:
    (warning,) = replace(made(0.8, lora=0.5), tasks={"color": 0.5, "count": 0.5}).warnings
    assert "export each task by itself" in warning and "task_mix" not in warning


def test_tasks_that_were_not_measured_are_warned_of_in_every_form() -> None:
    mixture = replace(made(0.8, lora=0.8), tasks={"color": 0.5, "count": 0.5}, unmeasured=["count"])
    merged = replace(mixture, measurements=made(0.8, merged=0.8).measurements, notes=())
    for fidelity in (mixture, merged):
        (warning,) = fidelity.warnings
        assert "without count: the split test has no sample of it. Put some into data.test." in warning


def test_polishing_that_was_thrown_away_is_not_advised_again() -> None:
    (warning,) = made(0.8, lora=0.5, polish_steps=0, polish_tried=150).warnings
    assert "--polish 300" in warning


def test_a_loss_that_came_with_the_original_weights_has_other_advice() -> None:
    (warning,) = made(0.8, lora=0.8, merged=0.5, merging=Merging("original", 0.001)).warnings
    assert "--base nf4" in warning and "--polish" not in warning


def test_the_form_in_the_folder_is_the_last_that_was_measured() -> None:
    fidelity = made(0.8, lora=0.8, merged=0.7, merging=Merging("nf4", 0.001))
    assert (fidelity.form, fidelity.score) == ("merged", 0.7)


@pytest.mark.parametrize(("split", "held_out"), [("test", True), ("validation", True), ("train", False)])
def test_training_rows_are_not_held_out(split: str, held_out: bool) -> None:
    assert made(0.8, lora=0.8, split=split).to_dict()["held_out"] is held_out


def test_the_metrics_of_a_score_have_their_recipes_names() -> None:
    live = Measurement(0.8, 1.0, ["a", "b"], {"color": "exact", "count": "anls", "shape": "exact"})
    assert replace(made(0.8, lora=0.8), live=live).metrics == "anls, exact"


def test_the_file_holds_everything() -> None:
    assert made(0.8, lora=0.8, merged=0.8, merging=Merging("nf4", 0.001)).to_dict() == {
        "form": "merged",
        "folder": "run/exports/color-lora",
        "run": "run",
        "tasks": {"color": 1.0},
        "split": "test",
        "unmeasured": [],
        "held_out": True,
        "samples": 2,
        "rank": 4,
        "projector": "base",
        "polish_steps": 0,
        "polish_tried": 0,
        "decided_on": "validation",
        "kept": {"rank": {"mean": 0.75, "layers": {"q": 0.5, "k": 1.0}}},
        "update_error": {"mean": pytest.approx(0.2), "layers": {"q": 0.1, "k": 0.3}},
        "base": "nf4",
        "logits_difference": 0.001,
        "notes": [],
        "exact_match": {"live": 0.8, "lora": 0.8, "merged": 0.8},
        "metrics": METRICS,
        "loss": {"live": 1.0, "lora": 1.5, "merged": 1.5},
        "agreement": {"lora": 0.5, "merged": 0.5},
        "warnings": [],
        "versions": {"torch": "2"},
    }
