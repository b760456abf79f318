"""Gemma 4's small models: an input table for every layer beside one that is lm_head too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qmixlora.backbone.levers import HostEmbedding, host_bytes
from qmixlora.data import load_split
from qmixlora.loss import supervised_loss
from qmixlora.session import TunedSession, open_session
from tests.families.case import Case
from tests.families.variants.gemma4_e2b import VARIANT


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(VARIANT, tmp_path_factory.mktemp("gemma4"))


def session_of(case: Case, **levers: Any) -> TunedSession:
    return open_session(case.recipe(model=levers), ["a", "b"])


def loss_of(case: Case, session: TunedSession) -> Tensor:
    rows = load_split(case.recipe().data, "train")
    return supervised_loss(session.model.eval(), session.collator([rows[0], rows[1]])).detach()


@pytest.fixture(scope="module")
def loss(case: Case) -> Tensor:
    return loss_of(case, session_of(case))


def test_offloaded_is_the_table_that_is_not_the_head_and_no_bit_changes(case: Case, loss: Tensor) -> None:
    session = session_of(case, offload_embeddings=True)
    decoder: Any = session.backbone.get_submodule(session.anatomy.language)
    assert isinstance(decoder.embed_tokens_per_layer, HostEmbedding)
    assert not isinstance(decoder.embed_tokens, HostEmbedding)
    assert host_bytes(session.model).embeddings == 384 * 2 * 64 * 4
    assert torch.equal(loss_of(case, session), loss)


@pytest.mark.parametrize(
    "levers", [{"quantize_lm_head": "nf4", "offload_embeddings": True}, {"quantize_embeddings": "int8"}]
)
def test_the_head_and_its_table_are_quantised_together_beside_it(
    levers: dict[str, Any], case: Case, loss: Tensor
) -> None:
    session = session_of(case, **levers)
    tables = [name for name, _ in session.backbone.named_buffers() if name.endswith("table.held")]
    assert len(tables) == (1 if "offload_embeddings" in levers else 2)
    assert 0 < abs(loss_of(case, session) - loss) < 0.2 * loss
