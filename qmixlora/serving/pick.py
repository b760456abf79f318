"""A picker among the exports of a run, for servers that take one adapter per request: it names the one for an
instruction. This file needs numpy, safetensors and tokenizers alone, and lies beside what it reads:

    python exports/picker/pick.py "how many shapes are there ?"

Shapes: V tokens of the vocabulary, K dimensions, T tasks, S tokens of the instruction.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

PICKER, TOKENIZER = "picker.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Pick:
    """The task whose training instructions are nearest to an instruction, and the `name` of its exports.

    `sure` is `1 - d1 / d2`, of the distances to the nearest task and to the next: 0 is a tie, 1 the mean of the task's
    own instructions. `familiar`: it is no farther from that mean than some training instruction from its own; each of
    these is.
    """

    task: str
    name: str
    sure: float
    familiar: bool


class Picker:
    """The picker in a folder. An instruction is where the mean of its tokens' rows is; the nearest task's mean wins."""

    def __init__(self, folder: Path) -> None:
        with safe_open(folder / PICKER, "np") as file:
            self.tokens_VK, self.means_TK = file.get_tensor("tokens"), file.get_tensor("means")
            about = file.metadata()
        self.names: dict[str, str] = json.loads(about["names"])
        # what rounding to fp32 moves rows and means, and so distances, by at most: the radius is of what they were
        rounded = np.finfo(np.float32).eps * np.linalg.norm(self.tokens_VK, axis=1).max()
        self.radius = float(about["radius"]) + float(rounded)
        self.tokenizer: Any = Tokenizer.from_file(str(folder / TOKENIZER))
        self.tokenizer.no_truncation()

    def pick(self, instruction: str) -> Pick:
        """Name the exports for an instruction. Raises ValueError for one without a token."""
        ids_S = self.tokenizer.encode(instruction.strip(), add_special_tokens=False).ids
        if not ids_S:
            raise ValueError("The instruction has no words.")
        place_K = self.tokens_VK[ids_S].mean(axis=0, dtype=np.float64)
        distance_T = np.linalg.norm(self.means_TK - place_K, axis=1)
        first, second = np.argsort(distance_T)[:2]
        task, name = list(self.names.items())[first]
        sure = 1 - distance_T[first] / max(distance_T[second], 1e-12)
        return Pick(task, name, float(sure), bool(distance_T[first] <= self.radius))


if __name__ == "__main__":
    print(json.dumps(asdict(Picker(Path(__file__).parent).pick(" ".join(sys.argv[1:])))))
