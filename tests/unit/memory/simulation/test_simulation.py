"""The account of a step: storages, and index tensors with values."""

from __future__ import annotations

import pytest
import torch

from qmixlora.memory.simulation.simulation import LiveStorages


def test_index_tensors_keep_their_values() -> None:
    states = torch.empty(3, 7, device="meta")
    with LiveStorages([states]) as storages:
        mask = (torch.arange(3) != 1).to("meta")
        assert states[mask].shape == (2, 7) and mask.nonzero().shape == (2, 1) and int(mask.sum()) == 2
        del mask
    assert storages.account.live < 3 * 512


def test_a_number_that_depends_on_weights_is_not_made_up() -> None:
    states = torch.empty(3, 7, device="meta")
    with LiveStorages([states]), pytest.raises(RuntimeError, match="cannot be planned"):
        float(states.sum())


def test_what_shares_a_storage_counts_once_even_when_it_is_made_again() -> None:
    """`mm` of three dimensions ends in `_unsafe_view`, which does not say that it is a view."""
    states, weight = torch.empty(2, 64, 128, device="meta"), torch.empty(128, 256, device="meta")
    with LiveStorages([states, weight]) as storages:
        for _ in range(2):  # the second time from memory
            out = states @ weight
            assert storages.account.live == out.nbytes == 2 * 64 * 256 * 4
            del out
    assert storages.account.live == 0 and storages.account.peak == 2 * 64 * 256 * 4


def test_what_goes_to_the_host_leaves_the_card_and_is_counted_there() -> None:
    states = torch.empty(2, 64, 128, device="meta")
    with LiveStorages([]) as storages:
        made = states * 2
        kept = made.cpu()
        del made
        assert storages.account.live == 0 and storages.account.offloaded == kept.nbytes
        back = kept.to("meta")
    assert storages.account.live == back.nbytes == kept.nbytes


def test_what_a_model_counts_on_the_host_is_counted() -> None:
    """Such as the order of windows, and where each image begins."""
    with LiveStorages([]) as storages:
        padded = torch.tensor([0, 1, -100, 2])
        assert padded[padded != -100].tolist() == [0, 1, 2]
        begins = torch.zeros(3, dtype=torch.int64)
        begins[1:] = torch.tensor([4, 8, 2]).to("meta").cumsum(0)[:-1]
        assert begins.tolist() == [0, 4, 12]
    assert storages.account.live < 3 * 512


def test_what_is_remembered_of_a_whole_number_is_not_taken_for_a_fraction() -> None:
    numbers = torch.empty(3, dtype=torch.int64, device="meta")
    with LiveStorages([numbers]):
        assert (numbers * 2).dtype == torch.int64 and (numbers * 2.0).dtype == torch.float32
        assert (numbers * 3.0).dtype == torch.float32 and (numbers * 3).dtype == torch.int64
