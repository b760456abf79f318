"""What a run has been shown since its last log: samples, and the share of padding in its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qmixlora import processes


class Seen:
    """Sums over batches, which still are on the host."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.places = 0

    def add(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count the batches of a step."""
        for batch in batches:
            if (mask_BS := batch.get("attention_mask")) is not None:
                self.samples += len(mask_BS)
                self.tokens += int(mask_BS.sum())
                self.places += mask_BS.numel()

    def take(self) -> dict[str, float]:
        """Return what belongs into a log (`samples` of all processes, `padding`: a share of all tokens), count anew."""
        samples, tokens, places = (processes.total(own) for own in (self.samples, self.tokens, self.places))
        self.samples = self.tokens = self.places = 0
        return {"samples": samples, "padding": 1 - tokens / places} if places else {}
