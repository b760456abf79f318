"""Updates of one layer as products of two thin matrices, and the mean update of a mixture among them.

Shapes: E = F factors in a pool, I in-features, O out-features, K rank, B samples.

A mixture adds `s B^T C^T A x` to a layer, where `s = alpha / R` and C (E x F) is the sample's mixing matrix. It is
linear in C, so the mean over samples is the same expression with the mean C: an ordinary LoRA of rank E. Norms and
distances only need the Gram matrices of the factors; an O x I matrix is never built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class LowRank:
    """`up_OK @ down_KI`, the change of one weight; LoRA's B and A with its scaling folded into B."""

    down_KI: Tensor
    up_OK: Tensor

    @property
    def rank(self) -> int:
        return len(self.down_KI)

    def inner(self, other: LowRank) -> Tensor:
        """`<self, other>` over all O x I entries, from K x K products, in fp64."""
        up_KL = self.up_OK.double().T @ other.up_OK.double()
        down_KL = self.down_KI.double() @ other.down_KI.double().T
        return (up_KL * down_KL).sum()

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """The nearest update of a smaller rank, and the share of `||self||^2` that it keeps.

        Both thin matrices go through QR and the K x K core through the SVD, so the cost is linear in O and I. The
        singular values are shared evenly between the two factors. A rank above K changes nothing; one above O or I has
        zeros in what is over, so that layers of all widths have one rank.
        """
        if rank >= self.rank:
            return self, 1.0
        left_OK, left_KK = torch.linalg.qr(self.up_OK.double())
        right_IK, right_KK = torch.linalg.qr(self.down_KI.double().T)
        u_KK, values_K, v_KK = torch.linalg.svd(left_KK @ right_KK.T, full_matrices=False)
        root_K = values_K[:rank].sqrt()
        up_OK = left_OK @ (u_KK[:, :rank] * root_K)
        down_KI = (root_K[:, None] * v_KK[:rank]) @ right_IK.T
        over = rank - len(root_K)
        down_KI, up_OK = pad(down_KI, (0, 0, 0, over)), pad(up_OK, (0, over))
        total = values_K.square().sum()
        share = float(values_K[:rank].square().sum() / total) if total > 0 else 1.0
        return LowRank(down_KI.float(), up_OK.float()), share


def mixed(pool_EI: Tensor, pool_FO: Tensor, scaling: float, mix_EF: Tensor) -> LowRank:
    """The update of a mixture whose mixing matrix is `mix_EF`: `lora_A = A`, `lora_B = (alpha / R) B^T C^T`."""
    up_OE = scaling * (mix_EF.double() @ pool_FO.double()).T
    return LowRank(pool_EI.float(), up_OE.float())


def squared_norms(pool_EI: Tensor, pool_FO: Tensor, scaling: float, mix_BEF: Tensor) -> Tensor:
    """`||dW||^2` of every sample's own update (B), `s^2 tr(C^T G_A C G_B)` with the pools' Gram matrices."""
    gram_EE = pool_EI.double() @ pool_EI.double().T
    gram_FF = pool_FO.double() @ pool_FO.double().T
    mix_BEF = mix_BEF.double()
    return scaling**2 * torch.einsum("bef,eg,bgh,fh->b", mix_BEF, gram_EE, mix_BEF, gram_FF)
