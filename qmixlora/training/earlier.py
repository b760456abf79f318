"""What was made of a run's adapter, set aside when a later one takes its place: scores and exports."""

from __future__ import annotations

import filecmp
from pathlib import Path

from qmixlora.adapter import ADAPTER_WEIGHTS

from .history import History

EARLIER = "earlier"  # in a run's folder
MADE_OF_AN_ADAPTER = (
    "evaluation*.json",
    "predictions*.jsonl",
    "unscored*.jsonl",
    "interference*.json",
    "figures",
    "exports",
)
OF_THE_BACKBONE = ("-backbone.json", "-backbone.jsonl")  # endings of names: no adapter has a part in these


def set_aside(folder: Path, weights: Path) -> str | None:
    """Move what was made of a run's adapter into `earlier/step-N/`, if the adapter to come has other weights than it.

    Returns what was moved, in words; None where nothing was. N is the step that the earlier adapter is of.
    """
    own = folder / "adapter" / ADAPTER_WEIGHTS
    if not own.is_file() or filecmp.cmp(own, weights, shallow=False):
        return None
    made = sorted(path for pattern in MADE_OF_AN_ADAPTER for path in folder.glob(pattern))
    made = [path for path in made if not path.name.endswith(OF_THE_BACKBONE)]
    if not made:
        return None
    step = History(folder).kept_step()
    name = "step-unknown" if step is None else f"step-{step}"
    names = (name, *(f"{name}-{number}" for number in range(2, 10_000)))
    target = next(path for path in (folder / EARLIER / one for one in names) if not path.exists())
    target.mkdir(parents=True)
    for path in made:
        path.rename(target / path.name)
    return f"{', '.join(path.name for path in made)} of the adapter so far: now in {target}"
