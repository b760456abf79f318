"""MixLoraConfig: the axes of Conditional Mixture-of-LoRA, each an independent word."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from peft import PeftConfig

PEFT_TYPE = "CONDITIONAL_MIXLORA"
FORMAT = 1  # of an adapter's files; raised whenever the same files would compute something else
PEFT_PREFIX = "base_model.model."  # of a module's path in the backbone, inside a PEFT model and its files

Pairing = Literal["conditional", "released", "tied"]
Gate = Literal["hard", "straight_through", "weighted", "dense"]
RouteOn = Literal["all", "instruction", "embedding", "task"]
ConditionNorm = Literal["none", "center"]
RouterScope = Literal["layer", "block", "model"]
GONE = {"pairing": "independent", "route_on": "prompt"}  # values that did not pay


@dataclass
class MixLoraConfig(PeftConfig):
    """Conditional Mixture-of-LoRA (Shen et al., ACL 2024, arXiv 2402.15896) as a PEFT method.

    Each target linear layer gets two pools of `num_factors` rank-one factors; routers pick `r` from each pool for every
    input instance and add `(alpha / r) * sum_i (x . a_i) b_i` to the layer's output, each product times its gate.

    The default picks sixteen of sixteen: a LoRA of this rank whose factors are weighed for each instance and none left
    out. On a language model it is the best of what was measured (docs/results.md).

    Args:
        num_factors: E, factors in each pool.
        r: R, factors active for an instance; at most `num_factors`.
        alpha: the update is scaled by `alpha / r`, as in LoRA.
        dropout: probability of dropping an input feature of the low-rank path (never of the routing).
        pairing: `conditional` (B's factors are chosen given A's: the paper), `released` (the same with the CFS of the
            authors' code), or `tied` (one selection).
        gate: `hard` (unweighted; the routers get no gradient and are frozen), `straight_through`, `weighted` (weights
            of the chosen factors have mean 1), or `dense` (all factors, gated, paired by index; where `pairing` is
            `tied`, what `weighted` is with `r=num_factors`, at the scale `alpha / num_factors`).
        route_on: the condition that an instance is routed on. Its own input to the layer, averaged over `all`
            positions or over the `instruction` (the prompt's text tokens); the instruction's input `embedding`s; or one
            learned vector per `task`.
        condition_norm: `center` layer-normalises the condition and subtracts its running mean; otherwise one shared
            direction hides the differences between inputs. `none` routes on the condition as it is (the paper).
        router: the layers that share one router, and so one selection: each `layer` has its own, those of a decoder
            `block` share one, or all layers of the `model`. Sharing needs a condition that all layers have in common
            (`route_on` an embedding or a task) and scores that do not depend on a layer's factors (`tied`).
        task_mix: share of training samples whose gates are replaced by the running mean of their task's gates.
        tasks: the task labels, needed by `route_on="task"` and by `task_mix`.
        task_dim: width of the learned task vectors.
        image_tokens: ids of the tokens that stand for images, marks around and between their parts included, which are
            no instruction; the model's config names some, where this is None.
        image_breaks: ids (of line breaks, say) that are no instruction where they stand between such tokens.
        target_modules, exclude_modules, modules_to_save: as in `peft.LoraConfig`.
        static_modules: those of the target modules, by the ends of their names, whose update is the same for all
            inputs: a plain LoRA of rank `r`, outside of the routing.
        format_version: of the adapter's files; those of a later one are refused.

    Raises:
        ValueError: for a value that is out of range or a combination that cannot work; all mistakes in one message.
    """

    num_factors: int = 16
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    pairing: Pairing = "tied"
    gate: Gate = "weighted"
    route_on: RouteOn = "embedding"
    condition_norm: ConditionNorm = "center"
    router: RouterScope = "layer"
    task_mix: float = 0.0
    tasks: list[str] | None = None
    task_dim: int = 64
    image_tokens: list[int] | None = None
    image_breaks: list[int] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    static_modules: list[str] | None = None
    bias: str = field(default="none", metadata={"help": "kept for PEFT's life cycle; only 'none' is supported"})
    format_version: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        problems = [message for message in self._problems() if isinstance(message, str)]
        if problems:
            raise ValueError("MixLoraConfig: " + "; ".join(problems))

    @classmethod
    def paper(
        cls,
        num_factors: int = 16,
        r: int = 4,
        *,
        target_modules: list[str] | str | None = None,
        modules_to_save: list[str] | None = None,
    ) -> MixLoraConfig:
        """The equations of the paper as they stand: IFS for A, IFS + CFS for B, unweighted top-R selection, routed on
        the layer's input averaged over the sequence; scaled by 2, as the LoRA it was compared with. Nothing in these
        equations hands the routers a gradient, so they stay as they were drawn.
        """
        return cls(
            num_factors=num_factors,
            r=r,
            alpha=2.0 * r,
            pairing="conditional",
            gate="hard",
            route_on="all",
            condition_norm="none",
            target_modules=target_modules,
            modules_to_save=modules_to_save,
        )

    @classmethod
    def released(
        cls,
        num_factors: int = 16,
        r: int = 4,
        *,
        target_modules: list[str] | str | None = None,
        modules_to_save: list[str] | None = None,
    ) -> MixLoraConfig:
        """The computation of the authors' code (VT-NLP/MixLoRA): as `paper`, with its own CFS and scaled by 2 E / R."""
        preset = cls.paper(num_factors, r, target_modules=target_modules, modules_to_save=modules_to_save)
        return replace(preset, pairing="released", alpha=2.0 * num_factors)

    @classmethod
    def sparse(
        cls,
        num_factors: int = 16,
        r: int = 4,
        *,
        target_modules: list[str] | str | None = None,
        modules_to_save: list[str] | None = None,
    ) -> MixLoraConfig:
        """Four factors of sixteen, chosen for each question: the default of earlier releases. It is 2 points above
        today's on a model to which words mean nothing, and below it on one that knows them (docs/results.md).
        """
        return cls(
            num_factors=num_factors,
            r=r,
            alpha=2.0 * r,
            target_modules=target_modules,
            modules_to_save=modules_to_save,
        )

    @classmethod
    def wide(
        cls,
        num_factors: int = 64,
        r: int = 16,
        *,
        target_modules: list[str] | str | None = None,
        modules_to_save: list[str] | None = None,
    ) -> MixLoraConfig:
        """Sixteen factors of 64, chosen by one router for each decoder block, at LoRA's scale. Of what was measured, it
        is the point that is level with LoRA r=16 on tasks never trained, on average in both benchmarks
        (docs/results.md), for three times the trainable parameters of the default.
        """
        preset = cls.sparse(num_factors, r, target_modules=target_modules, modules_to_save=modules_to_save)
        return replace(preset, router="block")

    def to_dict(self) -> dict[str, Any]:
        """Convert as `PeftConfig.to_dict`; PEFT may turn `target_modules` into a set, which JSON does not know."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def is_static(self, name: str) -> bool:
        """Whether the target module of this name is one of `static_modules`."""
        return any(ends_in(name, end) for end in self.static_modules or ())

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @property
    def takes_all(self) -> bool:
        """Whether no factor is left out: nothing is chosen, all are weighed and paired by index."""
        return self.gate == "dense" or (self.pairing == "tied" and self.r == self.num_factors)

    @property
    def pairs_by_index(self) -> bool:
        """Whether the i-th factor of one pool works with the i-th of the other alone: mixing matrices are diagonal."""
        return self.pairing == "tied" or self.gate == "dense"

    @property
    def selects_ahead(self) -> bool:
        """Whether every layer's factors are known before the first layer."""
        return self.route_on in ("embedding", "task")

    @property
    def reads_questions(self) -> bool:
        """Whether the condition is that of the instance's question, which has to be known."""
        return self.route_on in ("instruction", "embedding")

    @property
    def is_conditional(self) -> bool:
        """Whether the factors chosen from A move the scores of B, by a router of every layer's own."""
        return self.pairing in ("conditional", "released")

    @property
    def needs_tasks(self) -> bool:
        return self.route_on == "task" or self.task_mix > 0

    def _wrong_types(self) -> list[str]:
        """What is wrong with values of a type that no axis has, such as numbers in quotes."""
        numbers = {name: getattr(self, name) for name in ("alpha", "dropout", "task_mix")}
        wrong = [f"{name}={value!r} is no number" for name, value in numbers.items() if not _is_finite(value)]
        counts = {name: getattr(self, name) for name in ("num_factors", "r", "task_dim", "format_version")}
        wrong += [f"{name}={value!r} is no whole number" for name, value in counts.items() if not _is_whole(value)]
        lists = {"tasks": str, "static_modules": str, "image_tokens": Integral, "image_breaks": Integral}
        for name, kind in lists.items():
            if (value := getattr(self, name)) is not None and not _is_list_of(kind, value):
                wrong.append(f"{name}={value!r} is no list of {'names' if kind is str else 'ids'}")
        return wrong

    def _problems(self) -> list[str | bool]:
        if wrong_types := self._wrong_types():
            return [*wrong_types]
        if self.format_version > FORMAT:
            return [
                f"the adapter is of a later release: its format is {self.format_version}, and this release knows"
                f" {FORMAT}; upgrade qmixlora"
            ]
        hints = get_type_hints(MixLoraConfig)
        wrong: list[str | bool] = [
            f"{axis}={getattr(self, axis)!r} is none of {', '.join(get_args(hints[axis]))}"
            + (" (release 0.1 had it; open its adapters there)" if getattr(self, axis) == GONE.get(axis) else "")
            for axis in ("pairing", "gate", "route_on", "condition_norm", "router")
            if getattr(self, axis) not in get_args(hints[axis])
        ]
        return [
            *wrong,
            not 1 <= self.r <= self.num_factors and f"r={self.r} must lie between 1 and num_factors={self.num_factors}",
            self.alpha <= 0 and f"alpha={self.alpha} must be above 0",
            not 0 <= self.dropout < 1 and f"dropout={self.dropout} must lie in [0, 1)",
            not 0 <= self.task_mix <= 1 and f"task_mix={self.task_mix} must lie between 0 and 1",
            self.task_dim < 1 and f"task_dim={self.task_dim} must be at least 1",
            self.bias != "none" and f"bias={self.bias!r} is not supported, only 'none'",
            (
                self.gate == "weighted"
                and self.r == 1
                and "gate='weighted' needs r >= 2: a single weight with mean 1 is"
                " always 1, so the routers would learn nothing; use 'straight_through'"
            ),
            (
                self.router != "layer"
                and (not self.selects_ahead or self.is_conditional)
                and f"router={self.router!r} needs route_on='embedding' or 'task' and pairing='tied': otherwise"
                " conditions or scores are a layer's own"
            ),
            (
                self.needs_tasks
                and not self.tasks
                and "route_on='task' and task_mix > 0 need `tasks`, the list of task labels"
            ),
            bool(self.tasks) and len(set(self.tasks or ())) < len(self.tasks or ()) and "tasks has duplicates",
        ]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, kind) for one in value)


def ends_in(name: str, end: str) -> bool:
    """Whether a module's path is this, or ends so."""
    return name == end or name.endswith(f".{end}")


def router_of(layer: str, scope: RouterScope) -> str:
    """The name of the router that selects for a layer, by the layer's path: its own, its block's or the model's.

    A block is what the first number in the path counts (`model.layers.3`); a layer outside of blocks is one.
    """
    block = re.match(r"(.*?\.\d+)\.", layer)
    return {"layer": layer, "block": block[1] if block else layer, "model": ""}[scope]
