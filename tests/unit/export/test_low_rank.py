"""Updates as thin products, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from qmixlora.export.low_rank import LowRank, mixed, squared_norms
from qmixlora.export.static import learned_by
from qmixlora.mixlora import MixLoraConfig

E, I, O, B = 6, 20, 14, 5  # noqa: E741


@pytest.fixture
def pools() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(E, I), torch.randn(E, O)


def dense(update: LowRank) -> Tensor:
    return update.up_OK.double() @ update.down_KI.double()


def test_the_mean_update_is_the_oracle(pools: tuple[Tensor, Tensor]) -> None:
    """`s B^T C^T A`, factor by factor: a_e and b_f share a slot with weight C[e, f]."""
    mix_EF = torch.rand(E, E)
    oracle = torch.zeros(O, I, dtype=torch.float64)
    for e in range(E):
        for f in range(E):
            oracle += 1.7 * mix_EF[e, f].double() * torch.outer(pools[1][f].double(), pools[0][e].double())
    torch.testing.assert_close(dense(mixed(*pools, 1.7, mix_EF)), oracle, atol=1e-5, rtol=0)


def test_the_mean_of_the_live_layers_outputs_is_the_exported_layer() -> None:
    """On one input under several selections, the layer's mean update is that of the mean mixing matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, O))
    config = MixLoraConfig(num_factors=E, r=2, alpha=3, dropout=0.0, route_on="all", target_modules=["0"])
    tuned = get_peft_model(model, config)
    layer = tuned.base_model.model[0]
    nn.init.normal_(layer.mixlora_B["default"])
    tuned.eval()
    states_BSI = torch.randn(B, 3, I)
    with torch.no_grad():
        tuned(states_BSI)
        mix_BEF = tuned.base_model.last_selection()[0]
        x_I = torch.randn(I)
        outputs = []
        for mix_EF in mix_BEF:
            pool_A, pool_B = layer.mixlora_A["default"], layer.mixlora_B["default"]
            outputs.append(1.5 * ((x_I @ pool_A.T) @ mix_EF) @ pool_B)
        exported = learned_by(tuned).adapter(mix_BEF.mean(dim=0)[None]).updates["0"]
    torch.testing.assert_close(dense(exported).float() @ x_I, torch.stack(outputs).mean(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("widths", [(3, I), (O, 3), (2, 3)])
def test_a_rank_above_a_layers_width_is_that_rank_all_the_same(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    update = LowRank(torch.randn(E, widths[1]), torch.randn(widths[0], E))
    cut, kept = update.truncated(E - 1)
    assert cut.rank == cut.up_OK.shape[1] == E - 1 and kept == pytest.approx(1.0)
    torch.testing.assert_close(dense(cut), dense(update), atol=1e-5, rtol=0)


def test_truncation_is_the_best_of_its_rank(pools: tuple[Tensor, Tensor]) -> None:
    update = mixed(*pools, 2.0, torch.rand(E, E))
    left, values, right = torch.linalg.svd(dense(update), full_matrices=False)
    for rank in (1, 3, E):
        cut, kept = update.truncated(rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert cut.rank == rank
        torch.testing.assert_close(dense(cut), best, atol=1e-4, rtol=0)
        assert kept == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))


def test_truncation_above_the_rank_changes_nothing(pools: tuple[Tensor, Tensor]) -> None:
    update = mixed(*pools, 2.0, torch.rand(E, E))
    assert update.truncated(E + 1)[0] is update


def test_truncation_of_nothing_keeps_all_of_it() -> None:
    assert LowRank(torch.randn(3, I), torch.zeros(O, 3)).truncated(1)[1] == 1.0


def test_inner_products_are_those_of_dense_matrices(pools: tuple[Tensor, Tensor]) -> None:
    one, two = mixed(*pools, 2.0, torch.rand(E, E)), LowRank(torch.randn(3, I), torch.randn(O, 3))
    assert float(one.inner(two)) == pytest.approx(float((dense(one) * dense(two)).sum()))


def test_norms_are_those_of_dense_matrices(pools: tuple[Tensor, Tensor]) -> None:
    mix_BEF = torch.rand(B, E, E)
    expected = torch.stack([dense(mixed(*pools, 2.0, mix)).square().sum() for mix in mix_BEF])
    torch.testing.assert_close(squared_norms(*pools, 2.0, mix_BEF), expected, rtol=1e-5, atol=0)
