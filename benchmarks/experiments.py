"""Router ideas that were tried and are not in the package: what they change of a fresh trainer before it runs.

Each takes the Trainer of a run. Their results stay in docs/results.md; an idea that pays becomes a config value.

Shapes: B batch, S sequence, N instances (every segment of a sample), D width of the condition, E factors in a pool.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm

from qmixlora.data import IGNORED
from qmixlora.mixlora import batch as tuner_module
from qmixlora.mixlora import layer as layer_module
from qmixlora.mixlora import selection
from qmixlora.mixlora.routing import Routing
from qmixlora.mixlora.running_means import Center

ADAPTER = "default"
Condition = Callable[[Routing, dict[str, Tensor]], Tensor]  # of a batch: N x D


@contextmanager
def undone() -> Iterator[None]:
    """Whatever is changed in the package's modules inside the block is as before after it."""
    changed = [
        (tuner_module, "select"),
        (layer_module, "conditional_scores"),
        (selection, "independent_scores"),
        (selection, "_weights"),
    ]
    before = [getattr(module, name) for module, name in changed]
    try:
        yield
    finally:
        for (module, name), value in zip(changed, before, strict=True):
            setattr(module, name, value)


def frozen_routers(trainer: Any) -> None:
    """Routers as they were drawn."""
    for name, parameter in trainer.model.named_parameters():
        if "mixlora_route" in name:
            parameter.requires_grad_(False)


def quiet_routers(trainer: Any) -> None:
    """Routers of zeros: every instance has the same gates at first, so that with a dense gate training begins as
    LoRA's, and gates come apart as far as that pays.
    """
    for name, parameter in trainer.model.named_parameters():
        if "mixlora_route" in name:
            torch.nn.init.zeros_(parameter)


def random_routing(trainer: Any) -> None:
    """Route on noise that the instruction's tokens seed: random, and the same for the same instruction."""
    width = trainer.model.get_input_embeddings().embedding_dim

    def noise(routing: Routing, inputs: dict[str, Tensor]) -> Tensor:
        seeds = [zlib.crc32(str(ids_S.tolist()).encode()) for ids_S in instructions(routing, inputs["input_ids"])]
        drawn = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(inputs["input_ids"].device)

    replace_condition(trainer, lambda original: noise)


def instructions(routing: Routing, ids_BS: Tensor) -> list[Tensor]:
    """The tokens of every instance's instruction, in the order of the instances."""
    mask_BS, segments = routing.instruction_BS, routing.segments
    assert mask_BS is not None, "the collator tells the prompt"
    if segments is None:
        return [ids_S[mask_S] for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True)]
    most = segments.of_BSK.shape[2]
    places = [divmod(slot, most) for slot in segments.slot_N.tolist()]
    return [ids_BS[row, mask_BS[row] & segments.of_BSK[row, :, k]] for row, k in places]


def word_dropout(trainer: Any) -> None:
    """In training, each token of the instruction is left out of the condition with probability 0.2."""

    def changed(original: Condition) -> Condition:
        def condition(routing: Routing, inputs: dict[str, Tensor]) -> Tensor:
            assert routing.instruction_BS is not None, "the collator tells the prompt"
            kept_BS = routing.instruction_BS & (torch.rand_like(routing.instruction_BS, dtype=torch.float32) > 0.2)
            return original(replace(routing, instruction_BS=kept_BS), inputs)

        return condition

    replace_condition(trainer, changed, in_training=True)


def condition_dropout(probability: float) -> Any:
    """In training, an instance is routed on noise alone with this probability, as classifier-free guidance (Ho and
    Salimans, arXiv 2207.12598) leaves out what it conditions on. (A condition of zero would not do: all scores of all
    layers tie, and the same factors win each time.)
    """

    def changed(original: Condition) -> Condition:
        def condition(routing: Routing, inputs: dict[str, Tensor]) -> Tensor:
            condition_ND = original(routing, inputs)
            is_dropped_N1 = torch.rand_like(condition_ND[:, :1]) < probability
            return torch.where(is_dropped_N1, torch.randn_like(condition_ND), condition_ND)

        return condition

    return lambda trainer: replace_condition(trainer, changed, in_training=True)


def condition_noise(size: float) -> Any:
    """In training, Gaussian noise on the (layer-normalised, centred) conditions, of this standard deviation."""

    def changed(original: Condition) -> Condition:
        def condition(routing: Routing, inputs: dict[str, Tensor]) -> Tensor:
            condition_ND = original(routing, inputs)
            return condition_ND + size * torch.randn_like(condition_ND)

        return condition

    return lambda trainer: replace_condition(trainer, changed, in_training=True)


def replace_condition(trainer: Any, changed: Callable[[Condition], Condition], *, in_training: bool = False) -> None:
    """Make conditions (N x D) by another function of a batch's routing, made from the tuner's own; or in training
    alone.
    """
    tuner = trainer.model.base_model
    own = tuner._condition

    def original(routing: Routing, inputs: dict[str, Tensor]) -> Tensor:
        context = tuner.mixlora_routing
        before, context.current = context.current, routing
        condition_ND: Tensor = own(ADAPTER, inputs)
        context.current = before
        return condition_ND

    other = changed(original)

    def condition(name: str, inputs: dict[str, Tensor]) -> Tensor:
        chosen = other if trainer.model.training or not in_training else original
        return chosen(tuner.mixlora_routing.current, inputs)

    tuner._condition = condition


def layer_norm_only(trainer: Any) -> None:
    """Conditions on one scale, but with what they share left in."""

    def forward(self: Center, condition_BD: Tensor, routing: Any) -> Tensor:
        return layer_norm(condition_BD, condition_BD.shape[-1:])

    _replace_center(trainer, forward)


def unit_conditions(trainer: Any) -> None:
    """Centred conditions, scaled to one length."""
    original = Center.forward

    def forward(self: Center, condition_BD: Tensor, routing: Any) -> Tensor:
        centred_BD = original(self, condition_BD, routing)
        return layer_norm(centred_BD, centred_BD.shape[-1:])

    _replace_center(trainer, forward)


def _replace_center(trainer: Any, forward: Any) -> None:
    for module in trainer.model.modules():
        if isinstance(module, Center):
            module.forward = forward.__get__(module)


def temperature(value: float) -> Any:
    """The routers' logits divided by a constant: below 1 a sharper choice."""

    def prepare(trainer: Any) -> None:
        selection.independent_scores = lambda logits_BE: (logits_BE / value).softmax(dim=-1)

    return prepare


def sharper_sigmoid_scores(trainer: Any) -> None:
    sigmoid_scores(trainer, temperature=0.5)


def sigmoid_scores(trainer: Any, temperature: float = 1.0) -> None:
    """Factors scored each for itself; a chosen one weighs twice its score, so that all weigh 1 at first."""
    selection.independent_scores = lambda logits_BE: (logits_BE / temperature).sigmoid()
    selection._weights = lambda score_BR, config: 2 * score_BR


class _WithBalance(torch.autograd.Function):
    """Hands the mix on, and a gradient of one to the balance loss."""

    @staticmethod
    def forward(ctx: Any, mix: Tensor, balance: Tensor) -> Tensor:
        return mix

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def balance_loss(trainer: Any) -> None:
    """0.01 E sum_e usage_e^2 of every layer's mean scores over the batch: the Switch balance, for soft scores."""
    layers = len(trainer.model.base_model.mixlora_layers)

    def select(config: Any, logits_NE: Tensor, *others: Any) -> Tensor:
        mix_NEF = selection.select(config, logits_NE, *others)
        usage_LE = logits_NE.softmax(dim=-1).view(layers, -1, config.num_factors).mean(dim=1)
        return _WithBalance.apply(mix_NEF, 0.01 * config.num_factors * usage_LE.square().sum() / layers)

    tuner_module.select = select


def one_matrix_cfs(trainer: Any) -> None:
    """A CFS router of I x E, the same for every slot, in place of R x I x E."""

    def scores(chosen_BR: Tensor, pool_EI: Tensor, route_RIE: Tensor) -> Tensor:
        return torch.einsum("bri,ie->bre", pool_EI[chosen_BR], route_RIE[0]).softmax(dim=-1).sum(dim=1)

    layer_module.conditional_scores = scores


def reinforce(trainer: Any) -> None:
    """Unweighted selection, sampled, with a score-function gradient; each sample runs twice and is its twin's baseline.

    Twice the samples per step in all, so it sees as much data and costs twice as much as the others.
    """
    taken: list[Tensor] = []

    def select(config: Any, logits_NE: Tensor, *others: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return selection.select(config, logits_NE, *others)
        noise_NE = -torch.log(-torch.log(torch.rand_like(logits_NE).clamp(1e-9, 1 - 1e-9)))
        chosen_NR = (logits_NE + noise_NE).topk(config.r, dim=1).indices
        taken.append(logits_NE.log_softmax(dim=1).gather(1, chosen_NR).sum(dim=1))
        return torch.diag_embed(torch.zeros_like(logits_NE).scatter(1, chosen_NR, 1.0))

    def compute_loss(model: Any, inputs: dict[str, Any], **_: Any) -> Tensor:
        taken.clear()
        twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) else [*v, *v] for k, v in inputs.items()}
        labels = twice.pop("labels")[:, 1:]
        logits = model(**twice, use_cache=False).logits[:, :-1].float()
        token = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        loss_2B = (token.sum(dim=1) / (labels != IGNORED).sum(dim=1)).view(2, -1)
        log_p_2B = taken[0].view(-1, loss_2B.numel()).sum(dim=0).view(2, -1)
        return loss_2B.mean() + 0.1 * ((loss_2B - loss_2B.flip(0)).detach() * log_p_2B).mean()

    for name, parameter in trainer.model.named_parameters():
        if "mixlora_route" in name:
            parameter.requires_grad_(True)  # frozen under gate=hard
    tuner_module.select = select
    trainer.compute_loss = compute_loss
