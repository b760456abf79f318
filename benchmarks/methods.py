"""The methods that benchmarks/method.py compares: recipe overrides by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import experiments


@dataclass(frozen=True)
class Method:
    """`overrides` of the recipe tiny-cpu; `prepare` changes the fresh Trainer before it runs."""

    overrides: tuple[str, ...]
    prepare: Callable[[Any], None] | None = None


def lora(r: int) -> Method:
    return Method(("adapter.method=lora", f"adapter.r={r}", f"adapter.alpha={2 * r}"))


BASE = {  # every mixture says what it changes of this
    "num_factors": "16",
    "r": "4",
    "pairing": "tied",
    "gate": "weighted",
    "route_on": "embedding",
    "condition_norm": "center",
}


def mixture(*changes: str, prepare: Callable[[Any], None] | None = None) -> Method:
    axes = {**BASE, **dict(change.split("=") for change in changes)}
    axes.setdefault("alpha", str(2 * int(axes["r"])))  # the scale of LoRA, 2
    return Method(tuple(f"adapter.{axis}={value}" for axis, value in axes.items()), prepare)


AXES = {
    "pairing": ("conditional", "independent"),
    "gate": ("hard", "straight_through", "dense"),
    "route_on": ("all", "prompt", "instruction", "task"),
    "condition_norm": ("none",),
    "task_mix": ("0.1", "0.3", "0.5"),
}
ONE_CHANGE = [f"{axis}={value}" for axis, values in AXES.items() for value in values]
PAIRS = [
    *itertools.product(("pairing=conditional", "pairing=independent"), ("gate=hard", "gate=straight_through")),
    ("condition_norm=none", "route_on=instruction"),
]
SIZES = [("8", "2"), ("32", "4"), ("16", "8")]
PLAIN = ("condition_norm=none", "gate=hard", "route_on=all", "pairing=conditional")  # the paper's equations

METHODS = {
    **{f"lora-r{r}": lora(r) for r in (4, 16, 22)},  # R, E, and as many trainable parameters as the mixture
    "mixlora": mixture(),
    **{change: mixture(change) for change in ONE_CHANGE},
    **{",".join(changes): mixture(*changes) for changes in PAIRS},
    **{f"E={e},R={r}": mixture(f"num_factors={e}", f"r={r}") for e, r in SIZES},
    "paper": mixture(*PLAIN),
    "released": mixture(*PLAIN, "pairing=released", "alpha=32"),
    "frozen-routers": mixture(prepare=experiments.frozen_routers),
    "random-routing": mixture("condition_norm=none", "gate=hard", prepare=experiments.random_routing),
    "layer-norm-only": mixture(prepare=experiments.layer_norm_only),
    "unit-conditions": mixture(prepare=experiments.unit_conditions),
    "word-dropout": mixture(prepare=experiments.word_dropout),
    "condition-dropout-0.2": mixture(prepare=experiments.condition_dropout(0.2)),
    "condition-noise-0.5": mixture(prepare=experiments.condition_noise(0.5)),
    "sigmoid-scores": mixture(prepare=experiments.sigmoid_scores),
    "sigmoid-scores-temperature-0.5": mixture(prepare=experiments.sharper_sigmoid_scores),
    "temperature-0.5": mixture(prepare=experiments.temperature(0.5)),
    "temperature-0.25": mixture(prepare=experiments.temperature(0.25)),
    "one-router": mixture(prepare=experiments.one_router),
    "one-router-per-block": mixture(prepare=experiments.one_router_per_block),
    "balance-loss": mixture(prepare=experiments.balance_loss),
    "gates-mean": mixture("pairing=independent", prepare=experiments.gates_mean),
    "one-matrix-cfs": mixture("pairing=conditional", prepare=experiments.one_matrix_cfs),
    "reinforce": mixture("gate=hard", prepare=experiments.reinforce),
}

CONTROLS = (  # run with five seeds at the best of their learning rates
    "mixlora", "sigmoid-scores", "temperature-0.5", "lora-r4", "lora-r16", "lora-r22",
    "frozen-routers", "random-routing", "paper", "released",
)  # fmt: skip
SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = {  # tried on seed 0
    "mixlora": (2e-3, 3e-3),
    "temperature-0.5": (2e-3, 3e-3),
    "lora-r4": (2e-3, 4e-3),
    "lora-r16": (1.5e-3, 2e-3, 3e-3, 6e-3),
    "lora-r22": (1.5e-3,),
    "sigmoid-scores": (2e-3, 3e-3),
    "frozen-routers": (3e-3,),
    "word-dropout": (3e-3,),
    "paper": (2e-3, 4e-3),
    "released": (5e-4, 1e-3, 2e-3),
}
LEARNING_RATE = 2e-3  # of the others
