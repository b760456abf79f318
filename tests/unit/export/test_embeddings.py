"""The rows of a run's input embeddings that its tokenizer has tokens for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qmixlora.export.embeddings as embeddings
import qmixlora.export.router as router
from qmixlora.data import Collator
from qmixlora.session import open_tuned_run


def test_every_number_of_a_token_has_its_row_whatever_the_vocabulary_leaves_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", 4)
    session = open_tuned_run(run)
    table_VD = session.backbone.get_input_embeddings().weight.detach()
    for vocabulary, count in (({"a": 0, "b": 9, "c": 3}, 10), ({"a": 0, "b": len(table_VD) + 5}, len(table_VD))):
        tokenizer = SimpleNamespace(get_vocab=lambda own=vocabulary: own)
        rows_VD = torch.cat(list(embeddings.all_embedded(session, tokenizer)))
        assert torch.equal(rows_VD, table_VD[:count].cpu())


def test_a_router_reads_tokens_by_their_numbers_not_by_how_many_there_are(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_tuned_run(run)
    assert isinstance(session.collator, Collator)
    tokenizer = session.collator.processor.tokenizer
    last = max(tokenizer.get_vocab().values())
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: last - 3)  # as with four numbers that no token has
    assert len(router._embeddings(session)) == 1 + last
