"""The errors that are told are those of the layers that NF4 loading makes."""

from __future__ import annotations

import pytest
import torch

from qmixlora.backbone import load_backbone
from qmixlora.backbone.damage import kind_of, nf4_damage
from qmixlora.inspection.damage import damage_lines
from qmixlora.recipe import Model
from tests.conftest import CommandLine
from tests.families.case import Case
from tests.families.variant import variants


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(variants()["qwen3_vl_moe"], tmp_path_factory.mktemp("mixture"))


def test_errors_of_weights_are_those_of_the_loaded_layers(case: Case) -> None:
    wide, _, anatomy = load_backbone(Model(id=str(case.model), dtype="float32", quantization="none"))
    held, _, _ = load_backbone(Model(id=str(case.model), dtype="float32"))
    kinds = {kind.kind: kind for kind in nf4_damage(wide, anatomy)}
    assert {kind_of(path, anatomy) for path in (*anatomy.targets, *anatomy.experts)} == set(kinds)
    assert sum(kind.share for kind in kinds.values()) == pytest.approx(1)
    path = next(path for path in anatomy.targets if path.endswith("q_proj"))
    layer, weight = held.get_submodule(path), wide.get_parameter(f"{path}.weight")
    identity = torch.eye(weight.shape[1])
    error = float((layer(identity).T - weight).norm() / weight.norm())
    assert 0.02 < error <= kinds["self_attn.q_proj"].worst + 1e-5
    assert kinds["self_attn.q_proj"].layers == 2 and kinds["self_attn.q_proj"].outputs is None


def test_a_kind_that_a_recipe_keeps_is_not_measured(case: Case) -> None:
    spec = Model(id=str(case.model), dtype="float32", quantization="none", keep=["down_proj"])
    model, _, anatomy = load_backbone(spec)
    assert not [kind.kind for kind in nf4_damage(model, anatomy) if "down_proj" in kind.kind]


def test_the_command_measures_samples_and_names_what_to_keep(case: Case, qmixlora: CommandLine) -> None:
    shown = qmixlora("doctor", "--model", str(case.model), "--nf4", "--data", str(case.data), "--over", "0.01")
    assert "self_attn.q_proj" in shown.stdout and "model.keep: [" in shown.stdout
    assert shown.stdout.count("%") > 20  # shares, weights, the worst, and outputs of each kind


def test_nothing_is_advised_where_nothing_is_over() -> None:
    assert damage_lines([], 0.2)[-1] == "No kind of layer is over 20%."
