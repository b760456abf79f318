"""The layer equals the loop-style reference, in values and gradients, for every combination of the axes."""

from __future__ import annotations

import itertools
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from qmixlora.backbone import keep_cpu_weights_unpacked
from qmixlora.mixlora import MixLoraConfig
from qmixlora.mixlora.running_means import Center
from qmixlora.mixlora.selection import conditional_scores, released_conditional_scores

from .reference import update

PAIRINGS, GATES = ("conditional", "released", "tied"), ("hard", "straight_through", "weighted", "dense")
NAMES = ("mixlora_A", "mixlora_B", "mixlora_route_A", "mixlora_route_B", "mixlora_route_AB")


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module, vocabulary: int = 11) -> None:
        super().__init__()
        self.linear = layer
        self.embedding = nn.Embedding(vocabulary, 5)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        x: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        return self.linear(x)


def adapted(layer: nn.Module, **config: object) -> PeftModel:
    torch.manual_seed(1)
    settings = {
        "num_factors": 7,
        "r": 3,
        "alpha": 5.0,
        "dropout": 0.0,
        "condition_norm": "none",
        "tasks": ["s", "t"],
        "target_modules": ["linear"],
    }
    model = get_peft_model(OneLayer(layer), MixLoraConfig(**{**settings, **config}))
    for name, parameter in model.named_parameters():
        if "mixlora_" in name:  # away from the zero init, and far enough apart that no selection hangs by rounding
            nn.init.normal_(parameter)
    return model


def parameters_of(model: PeftModel) -> dict[str, Tensor]:
    layer = model.base_model.model.linear
    return {name: getattr(layer, name)["default"] for name in NAMES if "default" in getattr(layer, name)}


BATCH = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, -100, -100, 4, 5, -100], [-100, -100, 9, 10, -100, -100]]),
}
PROMPTS = (3, 2)  # tokens before the first supervised one


def condition(model: PeftModel, x_BSI: Tensor, sample: int, route_on: str) -> Tensor:
    if route_on == "task":
        return model.base_model.mixlora_task["default"][sample]
    if route_on == "embedding":
        ids = BATCH["input_ids"][sample, : PROMPTS[sample]]
        return torch.stack([model.base_model.model.embedding.weight[i] for i in ids]).mean(dim=0).detach()
    count = x_BSI.shape[1] if route_on == "all" else PROMPTS[sample]
    return x_BSI[sample, :count].detach().float().mean(dim=0)  # the router reads the input and does not shape it


@pytest.mark.parametrize("route_on", ["all", "instruction", "embedding", "task"])
@pytest.mark.parametrize(("pairing", "gate"), list(itertools.product(PAIRINGS, GATES)))
def test_values_and_gradients_equal_the_reference(pairing: str, gate: str, route_on: str) -> None:
    base = nn.Linear(13, 9)
    model = adapted(base, pairing=pairing, gate=gate, route_on=route_on, task_dim=4)
    x_BSI = torch.randn(2, 6, 13, requires_grad=True)
    output = model(x_BSI, **BATCH, tasks=["s", "t"])
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pull = torch.randn_like(output)
    own = torch.autograd.grad((output * pull).sum(), [x_BSI, *leaves.values()], allow_unused=True)

    expected = torch.stack(
        [
            base(x_BSI[b])
            + update(
                x_BSI[b], condition(model, x_BSI, b, route_on), parameters_of(model),
                r=3, alpha=5.0, pairing=pairing, kind=gate,
            )
            for b in range(2)
        ]
    )  # fmt: skip
    theirs = torch.autograd.grad((expected * pull).sum(), [x_BSI, *leaves.values()], allow_unused=True)

    torch.testing.assert_close(output, expected)
    for name, mine, reference in zip(["x", *leaves], own, theirs, strict=True):
        assert (mine is None) == (reference is None), name
        if mine is not None:
            # fp32 sums in another order: a few roundings of the largest entry
            atol = 1e-5 * max(1.0, float(reference.abs().max()))
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    trained_routers = [name for name in leaves if "route" in name or "mixlora_task" in name]
    assert bool(trained_routers) == (gate != "hard")
    assert all(own[1 + list(leaves).index(name)].abs().sum() > 0 for name in trained_routers)


@pytest.mark.parametrize("route_on", ["instruction", "embedding"])
def test_centred_conditions_equal_the_reference(route_on: str) -> None:
    base = nn.Linear(13, 9)
    model = adapted(base, route_on=route_on, condition_norm="center").eval()
    width = 13 if route_on == "instruction" else 5
    (center,) = (module for module in model.modules() if isinstance(module, Center))
    center.mean.copy_(torch.randn(1, width))
    x_BSI = torch.randn(2, 6, 13)
    rows = []
    for b, x_SI in enumerate(x_BSI):
        c = condition(model, x_BSI, b, route_on)
        c = (c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() - center.mean[0]
        rows.append(base(x_SI) + update(x_SI, c, parameters_of(model), r=3, alpha=5.0, pairing="tied", kind="weighted"))
    # a few roundings: the sums run in another order
    torch.testing.assert_close(model(x_BSI, **BATCH), torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "pairing", "alpha"),
    [(MixLoraConfig.paper, "conditional", 6.0), (MixLoraConfig.released, "released", 14.0)],
)
def test_presets_equal_their_equations(preset: Any, pairing: str, alpha: float) -> None:
    """The paper at scale 2, the released code at 2 E / R: unweighted, routed on all positions, padding and answer."""
    torch.manual_seed(1)
    base = nn.Linear(13, 9)
    model = get_peft_model(OneLayer(base), preset(num_factors=7, r=3, target_modules=["linear"])).eval()
    for name, parameter in model.named_parameters():
        if "mixlora_" in name:
            nn.init.normal_(parameter)
    x_BSI = torch.randn(2, 6, 13)
    expected = [
        base(x_SI)
        + update(x_SI, x_SI.mean(dim=0), parameters_of(model), r=3, alpha=alpha, pairing=pairing, kind="hard")
        for x_SI in x_BSI
    ]
    torch.testing.assert_close(model(x_BSI, **BATCH), torch.stack(expected))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "route" in name)


def test_the_two_conditional_scores_differ() -> None:
    """With factors whose entries sum to zero the released score knows nothing; the paper's does."""
    pool_EI, route_RIE = torch.randn(4, 6), torch.randn(2, 6, 4)
    pool_EI = pool_EI - pool_EI.mean(dim=1, keepdim=True)
    chosen_BR = torch.tensor([[0, 1], [2, 3]])
    torch.testing.assert_close(released_conditional_scores(chosen_BR, pool_EI, route_RIE), torch.full((2, 4), 0.25))
    assert conditional_scores(chosen_BR, pool_EI, route_RIE).std(dim=0).min() > 0.01


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 1, 5, 2, 2), (5, 5, 3, 17, 4), (33, 2, 1, 3, 31)])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_odd_shapes_equal_the_reference(shape: tuple[int, ...], pairing: str) -> None:
    factors, r, batch, width, out = shape
    base = nn.Linear(width, out)
    model = adapted(base, num_factors=factors, r=r, pairing=pairing, gate="straight_through", route_on="all")
    x_BSI = torch.randn(batch, 3, width)
    expected = torch.stack(
        [
            base(x) + update(x, x.mean(dim=0), parameters_of(model), r=r, alpha=5.0, pairing=pairing, kind="hard")
            for x in x_BSI
        ]
    )
    torch.testing.assert_close(model(x_BSI), expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_bf16_selects_as_fp32_and_computes_in_bf16(pairing: str, gate: str) -> None:
    base = nn.Linear(13, 9).to(torch.bfloat16)
    model = adapted(base, pairing=pairing, gate=gate, route_on="all")
    assert all(p.dtype == torch.float32 for p in parameters_of(model).values())
    x_BSI = torch.randn(2, 6, 13).to(torch.bfloat16)
    output = model(x_BSI)
    assert output.dtype == torch.bfloat16
    deltas = [
        update(x.float(), x.float().mean(dim=0), parameters_of(model), r=3, alpha=5.0, pairing=pairing, kind=gate)
        for x in x_BSI
    ]
    expected = base(x_BSI).float() + torch.stack(deltas)
    # bf16 keeps 8 bits; three products in a row, each rounded
    torch.testing.assert_close(output.float(), expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(("route_on", "pairing"), [("instruction", "conditional"), ("embedding", "tied")])
def test_autocast_does_not_touch_the_selection(route_on: str, pairing: str) -> None:
    model = adapted(nn.Linear(13, 9), pairing=pairing, route_on=route_on, condition_norm="center").eval()
    x_BSI = torch.randn(2, 6, 13)
    mixes = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(x_BSI, **BATCH)
        mixes += model.base_model.mixlora_routing.current.cache.mixing_matrices.values()
    assert torch.equal(mixes[0], mixes[1])


@pytest.mark.parametrize("double", [True, False])
def test_nf4_layer_equals_the_layer_on_the_dequantised_weight(double: bool) -> None:
    torch.manual_seed(0)
    quantized = bnb.nn.Linear4bit(
        64, 96, bias=True, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double
    ).to("cpu")
    keep_cpu_weights_unpacked(quantized)
    plain = nn.Linear(64, 96)
    plain.weight.data = bnb.functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
    plain.bias.data = quantized.bias.data.clone()
    models = [adapted(layer, route_on="all") for layer in (quantized, plain)]
    models[1].load_state_dict(
        {k: v for k, v in models[0].state_dict().items() if "mixlora_" in k or "embedding" in k}, strict=False
    )
    x_BSI = torch.randn(2, 5, 64)
    grads, outputs = [], []
    for model in models:
        x = x_BSI.clone().requires_grad_()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in parameters_of(model).values())])
    torch.testing.assert_close(outputs[0], outputs[1])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_all_factors_tied_and_hard_is_plain_lora() -> None:
    base = nn.Linear(13, 9)
    model = adapted(base, num_factors=4, r=4, pairing="tied", gate="hard", route_on="all")
    A, B = parameters_of(model)["mixlora_A"], parameters_of(model)["mixlora_B"]
    x_BSI = torch.randn(3, 5, 13)
    torch.testing.assert_close(model(x_BSI), base(x_BSI) + 5.0 / 4 * (x_BSI @ A.T) @ B)
