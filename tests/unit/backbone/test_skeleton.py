"""What cannot be tuned in NF4 is refused before anything is loaded; what was found in a model is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from qmixlora.backbone import find_anatomy, make_skeleton, parts_of, shares_of, skeleton
from qmixlora.errors import UserError
from qmixlora.recipe import Model
from tests.families.variant import variants

VARIANTS = variants()


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llama4"])
def test_experts_count_as_nf4_and_not_adapted(name: str) -> None:
    config, _ = VARIANTS[name].build()
    model, anatomy = make_skeleton(config, Model(id=name))
    shares = shares_of(model, anatomy)
    assert shares.experts / shares.all > 0.35 and shares.of_neither < 0.05
    assert shares_of(model, replace(anatomy, experts=())).of_neither > 0.35


def test_experts_are_no_hindrance_without_quantisation() -> None:
    config, _ = VARIANTS["qwen3_vl_moe"].build()
    assert make_skeleton(config, Model(id="x", quantization="none"))[1].targets


def test_experts_that_cannot_be_put_in_nf4_are_refused_by_name() -> None:
    config, _ = VARIANTS["qwen3_vl_moe"].build()
    config.text_config.moe_intermediate_size = 63  # 63 x 60 weights of an expert are no whole blocks
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 60
    with pytest.raises(UserError, match=r"neither NF4 nor adapted: model\.language_model\.layers\.\*\.mlp\.experts"):
        make_skeleton(config, Model(id="x"))


def test_what_gets_no_gradient_or_is_a_block_of_weights_is_not_adapted() -> None:
    """Nor is an indexer quantised: some cast hidden states to the dtype of its weights (GLM-5, Mistral Large 4)."""
    config, _ = VARIANTS["qwen4_exp"].build()
    model, anatomy = make_skeleton(config, Model(id="x"))
    choosing = [path for path in anatomy.targets if ".indexer." in path]
    assert choosing and not set(choosing) & set(anatomy.adaptable)
    assert not set(choosing) & set(anatomy.in_nf4) and set(choosing) <= set(anatomy.kept)
    kept = anatomy.keeping(["down_proj"])
    assert not set(choosing) & set(kept.in_nf4) and len(kept.in_nf4) < len(anatomy.in_nf4)
    model.get_submodule(anatomy.language).coefficients = nn.Linear(4, 16, bias=False)
    again = find_anatomy(model)
    small = f"{anatomy.language}.coefficients"
    assert small in again.kept and small not in again.targets


def test_a_class_without_sdpa_is_computed_eagerly_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = VARIANTS["got_ocr2"].build()
    skeleton._say_eager.cache_clear()
    model, _ = make_skeleton(config, Model(id="x"))
    assert model.config._attn_implementation == "eager"
    assert "model.attention: eager is used" in capsys.readouterr().err


def test_heads_and_routers_of_a_decoder_are_no_targets() -> None:
    config, _ = VARIANTS["llama4"].build()
    model, anatomy = make_skeleton(config, Model(id="x", quantization="none"))
    assert not [path for path in anatomy.targets if path.endswith(("lm_head", "router"))]
    routers = [name for name, module in model.named_modules() if name.endswith(".router")]
    assert routers and set(routers) <= set(anatomy.kept)
    assert len(anatomy.layers) == 2


@pytest.mark.parametrize(
    ("name", "projectors", "others"),
    [
        ("janus", ["model.aligner"], {"model.vqmodel", "model.generation_aligner"}),
        ("video_llava", ["model.multi_modal_projector"], {"model.video_tower"}),
        ("molmo2", ["model.multi_modal_projector"], set()),  # which is a PreTrainedModel of its own
    ],
)
def test_what_reads_no_image_is_no_projector(name: str, projectors: list[str], others: set[str]) -> None:
    config, _ = VARIANTS[name].build()
    anatomy = make_skeleton(config, Model(id="x"))[1]
    assert list(anatomy.projectors) == projectors and others <= set(anatomy.others) <= set(anatomy.kept)


def test_lists_of_projectors_are_opened() -> None:
    config, _ = VARIANTS["granite4_vision"].build()
    model, anatomy = make_skeleton(config, Model(id="x"))
    assert len(anatomy.projectors) > 1
    assert not [path for path in anatomy.projectors if isinstance(model.get_submodule(path), nn.ModuleList)]


def test_the_parts_of_a_model_are_told(backbone: Path) -> None:
    told = dict(parts_of(Model(id=str(backbone))).lines())
    assert told["projector (trained)"] == "model.multi_modal_projector"
    assert told["language model"].startswith("model.language_model (2 layers, 14 linear layers)")
    assert "% NF4 and adapted" in told["decoder's weights"]


def test_the_head_of_a_causal_model_inside_is_no_projector() -> None:
    model, anatomy = make_skeleton(CONFIG_MAPPING["nemotron_h_omni"](), Model(id="x"))
    assert model.get_output_embeddings() is None
    assert anatomy.projectors == ("multi_modal_projector",)
    assert "language_model.lm_head" in anatomy.kept and "language_model.lm_head" not in anatomy.targets


def test_a_tower_that_ends_in_the_decoders_width_is_no_projector() -> None:
    config, _ = VARIANTS["deepseek_vl_hybrid"].build()
    model, anatomy = make_skeleton(config, Model(id="x"))
    second, width = model.model.high_res_vision_model, config.text_config.hidden_size
    assert any(getattr(part, "out_features", None) == width for part in second.modules())
    assert anatomy.others == ("model.high_res_vision_model",)
