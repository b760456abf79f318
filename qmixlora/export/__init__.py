"""The exporter: a run to one ordinary adapter or merged checkpoint per task, with a report of its losses."""

from .exporter import export
from .fidelity import Fidelity
from .forms import are_of_tasks
from .targets import Request, exported_tasks

__all__ = ["Fidelity", "Request", "are_of_tasks", "export", "exported_tasks"]
