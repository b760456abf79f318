"""The command line: one verb per file, no logic, late imports."""

from __future__ import annotations


def run() -> None:
    """The `qmixlora` command. Ctrl-C ends it quietly while its parts are imported, too."""
    try:
        from .main import run as run_command
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_command()
