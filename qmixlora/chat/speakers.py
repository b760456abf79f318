"""Who answers: a run, its backbone without the adapter, and its exports; and which factors worked for an answer.

Shapes: L layers, E factors in a pool.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from qmixlora.adapter import ADAPTER_CONFIG
from qmixlora.device import free_memory
from qmixlora.mixlora import MixLoraConfig, MixLoraModel
from qmixlora.session import Session, TunedSession, open_run

OWN, BACKBONE = "run", "backbone"
ROOM = 2  # times its weights: free memory that is left to a model beside others


class Speakers:
    """The models of a folder by their names, loaded when they are first asked, and kept while there is room for more.

    Raises UserError as `open_run`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        own = open_run(folder)
        self.sessions, self.recipe = {OWN: own}, own.recipe
        config = own.model.active_peft_config if isinstance(own, TunedSession) else None
        self.mixture = config if isinstance(config, MixLoraConfig) else None
        self.names = [OWN, *([BACKBONE] if config else []), *(export.name for export in opened_exports(folder))]

    @contextmanager
    def speaking(self, name: str) -> Iterator[Session]:
        """The model with a name, for a block. Raises UserError as `open_run`."""
        session = self._session(OWN if name == BACKBONE else name)
        with session.without_adapter() if name == BACKBONE else nullcontext():
            yield session

    def _session(self, name: str) -> Session:
        if name not in self.sessions:
            if self.sessions and not self._have_room():
                self.sessions.clear()
                gc.collect()  # models are full of circles
            self.sessions[name] = open_run(self.folder if name == OWN else self.folder / "exports" / name)
        return self.sessions[name]

    def _have_room(self) -> bool:
        """Whether one more model fits, as large as the largest of those that are loaded."""
        largest = max(session.backbone.get_memory_footprint() for session in self.sessions.values())
        return free_memory() >= ROOM * int(largest)


def opened_exports(run: Path) -> list[Path]:
    """The folders of a run's exports that can be opened here: not those for llama.cpp."""
    exports = [path.parent for path in (run / "exports").glob("*/fidelity.json")]
    return sorted(one for one in exports if any((one / file).is_file() for file in (ADAPTER_CONFIG, "config.json")))


def factors_at_work(session: Session) -> tuple[dict[int, float], int] | None:
    """The factors of pool A by their shares of the gates for the question that the session has just answered, largest
    first, and the number of layers of which that is the mean; None for a model that routes nothing.
    """
    model = session.model.base_model if isinstance(session, TunedSession) else None
    if not isinstance(model, MixLoraModel) or any(layer.disable_adapters for layer in model.mixlora_layers):
        return None
    usage_LE = model.last_selection()[:, -1].sum(dim=2)
    share_E = (usage_LE / usage_LE.sum(dim=1, keepdim=True)).mean(dim=0)
    shares = sorted(enumerate(share_E.tolist()), key=lambda pair: -pair[1])
    return dict(shares), len(usage_LE)
