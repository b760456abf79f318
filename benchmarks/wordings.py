"""How alike a mixture routes the questions of one task: in the wordings of training, and in words that it never had.

    python benchmarks/wordings.py [--on embedded|real] [--seed 0] [NAME ...]

Of runs of method.py or real.py that are kept. The cosine of two questions' gates, mean over layers: 1 where they choose
and weigh the same factors, R / E where they choose R apart. `real.py table` puts it into docs/results.md.

Shapes: L layers, N questions, E factors in a pool.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
import experiments
from comparison import Comparison, best_run, trained
from on import COMPARISONS, add_on, results_of

from qmixlora.data import indices_by_task, load_conversations
from qmixlora.files import write_json
from qmixlora.session import TunedSession, make_collator

NAMES = ("mixlora", "E=64,R=16", "router=block,E=64,R=16", "gate=dense,E=16,R=16")
QUESTIONS = 20  # of each task and wording


def gates_of(session: TunedSession, file: Path) -> dict[str, Tensor]:
    """The gates of some questions of each task (L x N x E, of unit length)."""
    rows, collator = load_conversations(str(file)), make_collator(session.recipe, session.collator.processor)
    gates = {}
    for task, positions in indices_by_task(rows).items():
        batch = collator(list(rows.select(positions[:QUESTIONS])))
        with torch.inference_mode():
            session.model(**session.on_device(batch))
        gates[task] = normalize(session.model.base_model.last_selection().diagonal(dim1=2, dim2=3), dim=-1)
    return gates


def alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """By task, the mean cosine of every question of one with every question of the other; never of one with itself."""
    cosines = {}
    for task in one.keys() & other.keys():
        cosine_LNN = one[task] @ other[task].transpose(1, 2)
        if one is other:
            cosine_LNN = cosine_LNN[:, ~torch.eye(cosine_LNN.shape[1], dtype=torch.bool)]
        if cosine_LNN.numel():
            cosines[task] = round(float(cosine_LNN.mean()), 4)
    return cosines


def between(gates: Mapping[str, Tensor]) -> float:
    """The mean cosine of questions of different tasks."""
    return statistics.fmean(
        float((gates[one] @ gates[other].transpose(1, 2)).mean()) for one in gates for other in gates if one != other
    )


@experiments.undone()
def measured(comparison: Comparison, name: str, seed: int) -> dict[str, object]:
    run = best_run(comparison, name, seed)
    learned = trained(comparison, run)
    known, unknown = (
        gates_of(learned.session, comparison.make_data() / f"{split}.json") for split in ("test", "paraphrased")
    )
    return {
        "name": name,
        "seed": seed,
        "backbone": learned.backbone,
        "same_words": alike(known, known),
        "other_words": alike(known, unknown),
        "between_tasks": round(between(known), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    add_on(parser)
    arguments = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    results = results_of("wordings", arguments.on)
    results.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        result = measured(COMPARISONS[arguments.on], name, arguments.seed)
        write_json(results / f"{name}--seed{arguments.seed}.json", result)
        print(result, flush=True)


if __name__ == "__main__":
    main()
