"""The exporter: a run to one ordinary adapter or merged checkpoint per task, with a report of its losses."""

from .exporter import export
from .fidelity import Fidelity
from .targets import Request, exported_tasks

__all__ = ["Fidelity", "Request", "export", "exported_tasks"]
