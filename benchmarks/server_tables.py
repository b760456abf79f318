"""The tables of docs/serving.md, from the measurements that benchmarks/servers.py keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import fill

RESULTS, PAGE = Path(__file__).parent / "results" / "servers", Path(__file__).parents[1] / "docs" / "serving.md"
RIGHT = ("server", "model", "form", "dtype", "`check` says applied", "same answers", "mean difference", "largest")
IMAGES = ("server", "model", "dtype", "image", "same answers", "largest")
BROKEN = ("server", "what was wrong", "`qmixlora check` said", "exit")


def write_tables(page: Path = PAGE) -> None:
    """Fill the page with what is kept."""
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    right = [_right(one) for one in kept if "how" not in one]
    broken = [_broken(one) for one in kept if "how" in one]
    images = [row for one in kept if len(one.get("by_image", ())) > 1 for row in _by_image(one)]
    tables = {"servers": _table(RIGHT, right), "images": _table(IMAGES, images), "broken": _table(BROKEN, broken)}
    fill(page, tables)


def _right(one: dict[str, Any]) -> tuple[str, ...]:
    verdicts = list(one["check"].values())
    facts = (one["server"], one["model"], one["form"], one["dtype"])
    applied = f"{verdicts.count('applied')} of {len(verdicts)}" if verdicts else "-"
    counts = (applied, f"{one['same']} of {one['prompts']}")
    return (*facts, *counts, f"{one['mean_difference']:.1e}", f"{one['largest_difference']:.1e}")


def _by_image(one: dict[str, Any]) -> list[tuple[str, ...]]:
    facts = (one["server"], one["model"], one["dtype"])
    return [
        (*facts, size, f"{own['same']} of {own['prompts']}", f"{own['largest_difference']:.1e}")
        for size, own in one["by_image"].items()
    ]


def _broken(one: dict[str, Any]) -> tuple[str, ...]:
    said = f"{one['verdict']}: {' '.join(one['reasons'])}" if one["reasons"] else one["verdict"]
    return (one["server"], one["how"], said, str(one["exit"]))


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else "(no runs yet)"
