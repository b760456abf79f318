"""What to make of a figure: one table of thresholds, each with its reason, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape

from qmixlora.errors import some

from .routing import RoutingSummary

NAMED = 5  # tasks, in a sentence

Verdict = Literal["good", "watch", "act"]


@dataclass(frozen=True)
class Threshold:
    """The values from which a figure is to be watched and acted on; smaller is better, after `sign`.

    `reason` says where the two numbers come from.
    """

    watch: float
    act: float
    reason: str
    sign: int = 1  # -1: larger is better

    def verdict(self, value: float) -> Verdict:
        """`good`, `watch` or `act`."""
        value, watch, act = (self.sign * number for number in (value, self.watch, self.act))
        return "act" if value >= act else "watch" if value >= watch else "good"


THRESHOLDS: Mapping[str, Threshold] = {
    "uniform": Threshold(0.95, 0.995, "entropy 1: every factor alike, as in one LoRA of rank E"),
    "collapsed": Threshold(0.25, 0.1, "entropy 0: one factor does all; 0.25 are two of sixteen, used alike", sign=-1),
    "dead": Threshold(
        0.1, 0.5, "shares of a pool; sparse mixtures are held to be unbalanced when a tenth of the experts idle"
    ),
    "similarity": Threshold(0.9, 0.99, "cosine 0.9: under a fifth of the squared norm of C_t is a task's own"),
    "interference": Threshold(
        0.03, 0.08, "docs/results.md: half of the mean size, since half is harm; LoRA r=16 has 0.03, r=4 0.08 in A"
    ),
    "update_error": Threshold(
        0.3, 0.7, "docs/export.md: share of the update that no static adapter has; 0.7 and more lost up to a quarter"
    ),
    "fidelity": Threshold(0.98, 0.95, "share of the live score; an export under 0.95 is warned of", sign=-1),
}


@dataclass(frozen=True)
class Reading:
    """A figure in a sentence, with what to do about it where something is to be done."""

    verdict: Verdict
    text: str

    def styled(self) -> str:
        """The reading for a rich console."""
        color = {"good": "green", "watch": "yellow", "act": "bold red"}[self.verdict]
        return f"[{color}]{self.verdict}[/{color}]: {escape(self.text)}"


def read_routing_figures(summary: RoutingSummary) -> list[Reading]:
    """The readings of entropy, dead factors and similarity, and of tasks that none of them is of."""
    return [*_unseen(summary), _entropy(summary), _dead(summary), *_similarity(summary)]


def _unseen(summary: RoutingSummary) -> list[Reading]:
    count = len(summary.unseen)
    if not count:
        return []
    told = f"training saw no sample of {count} of {count + len(summary.tasks)} tasks ({some(summary.unseen, NAMED)})"
    return [
        Reading("watch", f"{told}: what is told of routing is of the others. Train longer (train.epochs or max_steps).")
    ]


def _entropy(summary: RoutingSummary) -> Reading:
    mean = float(summary.entropy().mean())
    uniform, collapsed = THRESHOLDS["uniform"].verdict(mean), THRESHOLDS["collapsed"].verdict(mean)
    if uniform != "good":
        return Reading(
            uniform,
            f"the entropy of factor usage is {mean:.2f}: all factors are used nearly alike, as in one LoRA of rank E. "
            "Train longer, or use gate: weighted and condition_norm: center.",
        )
    if collapsed != "good":
        return Reading(
            collapsed,
            f"the entropy of factor usage is {mean:.2f}: a task uses one factor or two. Lower adapter.num_factors, or "
            "train at a smaller learning rate.",
        )
    return Reading("good", f"the entropy of factor usage is {mean:.2f} (0 one factor, 1 all alike): tasks choose.")


def _dead(summary: RoutingSummary) -> Reading:
    dead_PLE = summary.dead()
    share, factors = float(dead_PLE.float().mean()), dead_PLE.shape[2]
    verdict = THRESHOLDS["dead"].verdict(share)
    told = f"{share:.0%} of the factors are dead (no task gives them a tenth of an even share of its gates)"
    if verdict == "good":
        return Reading(verdict, f"{told}.")
    enough = max(1, round(factors * (1 - share)))
    return Reading(verdict, f"{told}: adapter.num_factors={enough} would do as much with less memory.")


def _similarity(summary: RoutingSummary) -> list[Reading]:
    tasks = len(summary.tasks)
    if tasks < 2:
        return []
    similarity_TT = summary.similarity()
    mean = float((similarity_TT.sum() - similarity_TT.diagonal().sum()) / (tasks * (tasks - 1)))
    verdict = THRESHOLDS["similarity"].verdict(mean)
    told = f"the tasks' mean updates have a similarity of {mean:.2f} (cosine of C_t, mean of all pairs)"
    if verdict == "good":
        return [Reading(verdict, f"{told}: tasks have factors of their own.")]
    return [
        Reading(
            verdict,
            f"{told}: the tasks share nearly all. One export for all (--together) loses little; if tasks disturb each "
            "other, try adapter.route_on: task.",
        )
    ]


def read_interference(tasks: Sequence[str], means: Mapping[str, Sequence[Sequence[float | None]]]) -> Reading:
    """The reading of interference matrices by pool: what a step for one task costs another on average, in steps of its
    own, and the worst pair. An entry counts as -1 at most: larger ones are ratios to next to no effect of its own.
    """
    pairs = [
        (max(value, -1.0), pool, tasks[j], tasks[i])
        for pool, rows in means.items()
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if i != j and value is not None and value == value
    ]
    if not pairs:
        return Reading("watch", "interference could not be measured: no task's own step lowers its loss.")
    harm = -sum(min(value, 0.0) for value, *_ in pairs) / len(pairs)
    worst, pool, cause, harmed = min(pairs)
    verdict = THRESHOLDS["interference"].verdict(harm)
    told = (
        f"a step for one task costs another {harm:.1%} of its own step on average; the worst is {cause} for {harmed} "
        f"(pool {pool}, {worst:.2f})"
    )
    if verdict == "good":
        return Reading(verdict, f"{told}.")
    advice = "raise adapter.num_factors, or route on the task (adapter.route_on: task)"
    return Reading(verdict, f"{told}: {advice}.")


def read_export(update_error: float, live: float, own: float) -> Reading:
    """The reading of an export: the share of the update that its mean leaves out, and the scores before and after."""
    if not live:
        why = "there was nothing to lose: the live model has no right answer on these samples"
        return Reading("act", f"{why}. Train longer (train.epochs), and see what it says: qmixlora eval RUN --wrong 5.")
    kept = own / live
    fidelity, error = THRESHOLDS["fidelity"].verdict(kept), THRESHOLDS["update_error"].verdict(update_error)
    told = f"update error {update_error:.2f} (0: the mixture is static), {kept:.0%} of the live score"
    if fidelity == "act":
        return Reading("act", f"{told}: polish it longer (--polish), or train with adapter.task_mix=0.3.")
    if fidelity == "watch" or error == "act":
        return Reading("watch", f"{told}: the score rests on polishing; look at its answers on rows of your own.")
    return Reading("good", f"{told}.")


def lossy(readings: Iterable[tuple[str, Reading]]) -> Iterator[Reading]:
    """The readings of exports, by their names, that lost something; those that read alike as one."""
    names: dict[Reading, list[str]] = {}
    for name, reading in readings:
        if reading.verdict != "good":
            names.setdefault(reading, []).append(name)
    for reading, alike in names.items():
        named = " and ".join(part for part in (", ".join(alike[:-1]), alike[-1]) if part)
        yield Reading(reading.verdict, f"in {named}: {reading.text}")
