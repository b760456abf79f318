"""A processor that gives an image another number of tokens than the model has features is refused, with its fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmixlora.backbone.image_tokens import check_counting
from qmixlora.errors import UserError
from qmixlora.session import open_collator
from tests.families.case import Case
from tests.families.variant import variants

VARIANTS = variants()
WRONG = [
    {"patch_size": None},
    {"num_additional_image_tokens": 0},
    {"vision_feature_select_strategy": "full"},
    {"vision_feature_select_strategy": None},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_a_setting_that_an_early_checkpoint_lacks_is_named_with_its_value(settings: dict[str, Any]) -> None:
    config, processor = VARIANTS["llava"].build()
    for name, value in settings.items():
        setattr(processor, name, value)
    with pytest.raises(UserError, match="another number of tokens") as refused:
        check_counting(processor, config, "here")
    for words in (
        *settings,
        '"patch_size": 7',
        '"num_additional_image_tokens": 1',
        '"default"',
        "processor_config.json",
    ):
        assert words in str(refused.value)


@pytest.mark.parametrize("name", ["llava", "llava_qwen", "llava_next", "llava_next_video", "video_llava", "vipllava"])
def test_processors_that_count_right_pass(name: str) -> None:
    config, processor = VARIANTS[name].build()
    check_counting(processor, config, "here")


def test_what_comes_to_the_same_number_passes() -> None:
    """SigLIP has no token before its patches: none added and none taken, or one of each."""
    config, processor = VARIANTS["llava_qwen"].build()
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 1, "default"
    check_counting(processor, config, "here")


def test_a_checkpoint_is_refused_before_its_data_is_looked_at(tmp_path: Path) -> None:
    case = Case(VARIANTS["llava"], tmp_path)
    file = case.model / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": None}), encoding="utf-8")
    with pytest.raises(UserError, match="another number of tokens"):
        open_collator(case.recipe())
