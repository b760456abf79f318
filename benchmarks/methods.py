"""The methods that method.py and real.py compare, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import experiments
import rivals

from qmixlora.session import TunedSession


@dataclass(frozen=True)
class Method:
    """`overrides` of the recipe; `prepare` changes the fresh Trainer before it runs.

    `by_task`: a LoRA is trained for each task. `join` makes one model of them; without it each answers the samples of
    its own task, so that there is nobody for tasks that were not trained.
    """

    overrides: tuple[str, ...]
    prepare: Callable[[Any], None] | None = None
    by_task: bool = False
    join: Callable[[TunedSession, Sequence[str]], None] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the recipe says all, so that the package opens what was trained."""
        return self.prepare is None and not self.by_task


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
    "pairing": ("conditional",),
    "gate": ("hard", "straight_through", "dense"),
    "route_on": ("all", "instruction", "task"),
    "condition_norm": ("none",),
    "router": ("block", "model"),
    "task_mix": ("0.1", "0.3", "0.5"),
}
ONE_CHANGE = [f"{axis}={value}" for axis, values in AXES.items() for value in values]
PAIRS = [
    ("pairing=conditional", "gate=hard"),
    ("pairing=conditional", "gate=straight_through"),
    ("condition_norm=none", "route_on=instruction"),
]
SIZES = [("8", "2"), ("32", "4"), ("16", "8"), ("64", "8"), ("64", "16")]
PLAIN = ("condition_norm=none", "gate=hard", "route_on=all", "pairing=conditional")  # the paper's equations

# one projector for all; the outputs of every LoRA exist at once
ARROW = ("adapter.train_projector=false", "train.eval_batch_size=16")

METHODS = {
    **{f"lora-r{r}": lora(r) for r in (4, 16, 22)},  # R, E, and as many trainable parameters as the mixture
    "mixlora": mixture(),
    **{change: mixture(change) for change in ONE_CHANGE},
    **{",".join(changes): mixture(*changes) for changes in PAIRS},
    **{f"E={e},R={r}": mixture(f"num_factors={e}", f"r={r}") for e, r in SIZES},
    **{
        f"router={scope},E={e},R={r}": mixture(f"router={scope}", f"num_factors={e}", f"r={r}")
        for scope in ("block", "model")
        for e, r in SIZES
    },
    # a LoRA of rank E at LoRA's scale, whose rows are weighted: with R of 4 a dense gate has a quarter of it
    **{
        f"gate=dense,E={e},R={e}{how}": mixture("gate=dense", f"num_factors={e}", f"r={e}", prepare=prepare)
        for how, prepare in {"": None, ",quiet-routers": experiments.quiet_routers}.items()
        for e in (16, 64)
    },
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
    "balance-loss": mixture(prepare=experiments.balance_loss),
    "one-matrix-cfs": mixture("pairing=conditional", prepare=experiments.one_matrix_cfs),
    "reinforce": mixture("gate=hard", prepare=experiments.reinforce),
    **{
        f"pairing=shared_a{size}": mixture(*changes, prepare=rivals.shared_a)
        for size, changes in {"": (), ",E=64,R=16": ("num_factors=64", "r=16")}.items()
    },
    **{f"shared={count}": mixture(prepare=rivals.always_on(count)) for count in (4, 8)},
    # a whole LoRA of rank 16 that is always on, beside sixteen factors chosen of 64
    "shared=16,E=80,R=16": mixture("num_factors=80", "r=16", prepare=rivals.always_on(16)),
    **{
        f"states-{share}-{below}": mixture(prepare=rivals.contextual(share, below))
        for share in (0.25, 0.5)
        for below in ("embedding", "uniform")
    },
    **{
        f"question-ahead-4{size}": mixture(*changes, prepare=rivals.question_read_ahead(4))
        for size, changes in {"": (), ",E=64,R=16": ("num_factors=64", "r=16")}.items()
    },
    "lora-per-task": replace(lora(16), by_task=True),
    "arrow": Method((*lora(16).overrides, *ARROW), by_task=True, join=rivals.arrow),
}

GONE = (  # lines without code
    "pairing=independent", "route_on=prompt", "gates-mean",
    "states-0.25-embedding,raw",  # states that were not normalised
)  # fmt: skip

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
