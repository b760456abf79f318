"""Draw docs/overview.png from the folder of a finished demo: `python docs/overview.py demo docs/overview.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image


def images(axes: list[Axes], demo: Path) -> None:
    rows = json.loads((demo / "data" / "test.json").read_text(encoding="utf-8"))
    for axis, start in zip(axes, (0, 10, 25), strict=True):
        row = rows[start]
        same = [r for r in rows if r["image"] == row["image"]][:3]
        axis.imshow(Image.open(demo / "data" / row["image"]), interpolation="nearest")
        turns = [r["conversations"] for r in same]
        lines = [f"{a['value'].removeprefix('<image>').strip()}  {b['value']}" for a, b in turns]
        axis.set_xlabel("\n".join(lines), fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])


def method(axis: Axes) -> None:
    def box(x: float, y: float, w: float, h: float, text: str, color: str) -> None:
        axis.add_patch(plt.Rectangle((x, y), w, h, facecolor=color, edgecolor="black", linewidth=0.8))
        axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8)

    def arrow(x: float, y: float, dx: float, dy: float) -> None:
        axis.annotate("", (x + dx, y + dy), (x, y), arrowprops={"arrowstyle": "->", "linewidth": 0.9})

    axis.set_xlim(0, 10)
    axis.set_ylim(0, 10)
    axis.axis("off")
    box(0.3, 7.6, 3.6, 1.6, "image\nvision tower (frozen)", "#dddddd")
    box(0.3, 5.0, 3.6, 1.6, "projector\n(trained, fp32)", "#bfe3c0")
    box(0.3, 0.6, 3.6, 3.2, "decoder layers\nNF4, 4-bit, frozen", "#c7d7ee")
    box(5.2, 7.6, 4.4, 1.6, "instruction\npicks R of E factors", "#f5e2b8")
    box(5.2, 4.4, 4.4, 2.2, "pools of rank-one factors\na$_1$ … a$_E$   b$_1$ … b$_E$\n(trained, fp32)", "#bfe3c0")
    box(5.2, 0.9, 4.4, 2.2, "update for this input\n$\\frac{\\alpha}{R}\\sum_i g_i\\,(x\\cdot a_i)\\,b_i$", "#bfe3c0")
    for x, y, dx, dy in (
        (2.1, 7.6, 0, -1),
        (2.1, 5.0, 0, -1.2),
        (7.4, 7.6, 0, -1),
        (7.4, 4.4, 0, -1.3),
        (5.2, 2.0, -1.3, 0),
    ):
        arrow(x, y, dx, dy)


def scores(axis: Axes, summary: dict) -> None:
    tasks = list(summary["tasks"]["tuned"])
    for offset, name, color in ((-0.28, "backbone", "#999999"), (0, "blind", "#e0a030"), (0.28, "tuned", "#3f8f4f")):
        values = [summary["tasks"][name][task]["exact_match"] for task in tasks]
        label = f"{name} (mean {summary[name]:.2f})"
        axis.barh([i + offset for i in range(len(tasks))], values, 0.26, color=color, label=label)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("exact match, test split", fontsize=8)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, 1.16), ncols=3, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def main(demo: Path, target: Path) -> None:
    figure = plt.figure(figsize=(12, 4.8), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(0.8, 1.2, 1.2))
    left.suptitle("one image, many tasks", fontsize=10)
    images(list(left.subplots(3, 1)), demo)
    middle.suptitle("a mixture of LoRA factors on a 4-bit model", fontsize=10)
    method(middle.subplots())
    right.suptitle("after `qmixlora demo`", fontsize=10)
    scores(right.subplots(), json.loads((demo / "summary.json").read_text(encoding="utf-8")))
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
