"""Kinds of models that cannot be tuned are refused by their config, with what to use in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from qmixlora.backbone import load_backbone, make_skeleton, parts_of
from qmixlora.backbone.kinds import REFUSED
from qmixlora.errors import UserError
from qmixlora.memory.architectures import config_of
from qmixlora.recipe import Model
from tests.families.variant import variants

SPEC = Model(id="x")


@pytest.mark.parametrize("kind", ["florence2", "pix2struct", "t5gemma2", "udop", "pp_formulanet"])
def test_an_encoder_decoder_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=f"'{kind}' models are encoder-decoders"):
        make_skeleton(CONFIG_MAPPING[kind](), SPEC)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_is_refused_with_what_to_use(kind: str) -> None:
    with pytest.raises(UserError) as refused:
        make_skeleton(CONFIG_MAPPING[kind](), SPEC)
    assert refused.value.what == REFUSED[kind][0] and refused.value.fix


def test_a_model_of_text_alone_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="AutoModelForImageTextToText has no class for 'llama' models") as refused:
        make_skeleton(CONFIG_MAPPING["llama"](), SPEC)
    assert "Config" not in refused.value.what


def test_a_decoder_that_holds_its_image_encoder_is_refused() -> None:
    config, _ = variants()["idefics"].build()
    with pytest.raises(UserError, match="image encoder inside its decoder"):
        make_skeleton(config, SPEC)


@pytest.mark.parametrize(
    ("facts", "use"),
    [
        ({"model_type": "minicpmv", "auto_map": {"AutoConfig": "a.B", "AutoModel": "a.C"}}, "MiniCPM-V-4.6"),
        ({"model_type": "deepseek_vl_v2", "auto_map": {"AutoConfig": "a.B", "AutoModel": "a.C"}}, "DeepSeek-OCR-2"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "a.B", "AutoModel": "a.C"}}, "-HF"),
        ({"model_type": "llava_llama"}, "llava-hf/"),
    ],
)
def test_code_of_a_repository_is_refused_with_what_transformers_has(tmp_path: Path, facts: dict, use: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match="code of the model's own repository") as refused:
        load_backbone(Model(id=str(tmp_path)))
    assert use in str(refused.value.fix)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "auto"}, {"text_config": {"model_type": "llama", "num_hidden_layers": "2"}}, {"text_config": 3}],
)
def test_values_that_a_config_has_no_use_for_are_named(tmp_path: Path, backbone: Path, change: dict[str, Any]) -> None:
    shutil.copytree(backbone, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    for use in (load_backbone, config_of, parts_of):
        with pytest.raises(UserError, match=r"config\.json holds what transformers cannot read"):
            use(Model(id=str(tmp_path)))
