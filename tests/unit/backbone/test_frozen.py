"""Frozen towers compute in training as in generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qmixlora.session import TunedSession, open_session
from tests.families.case import TASKS, Case
from tests.families.variant import Made, variants

QIANFAN = variants()["qianfan_ocr"]


def with_drop_path(tokens) -> Made:  # type: ignore[no-untyped-def]
    config, processor = QIANFAN.make(tokens)
    config.vision_config.drop_path_rate = 0.5
    config.vision_config.hidden_dropout_prob = 0.5
    return config, processor


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(replace(QIANFAN, make=with_drop_path), tmp_path_factory.mktemp("qianfan"))


def opened(case: Case, train_projector: bool) -> TunedSession:
    return open_session(case.recipe(adapter={"train_projector": train_projector}), TASKS)


def test_a_frozen_tower_with_drop_path_is_deterministic_in_training(case: Case) -> None:
    session = opened(case, train_projector=True)
    session.model.train()
    batch = case.session.collator(case.rows)
    with torch.no_grad():
        first, second = (session.model(**batch, use_cache=False).logits for _ in range(2))
        inferred = session.model.eval()(**batch, use_cache=False).logits
    assert torch.equal(first, second) and torch.equal(first, inferred)


def test_a_projector_follows_training_only_where_it_is_trained(case: Case) -> None:
    for trained in (True, False):
        model = opened(case, trained).model.train()
        modules = [m for name, m in model.named_modules() if "projector" in name and not list(m.children())]
        assert any(m.training for m in modules) == trained
        assert any(m.training for name, m in model.named_modules() if "q_proj" in name)
