"""docs/gpu.md from the results of benchmarks/gpu.py: what was measured, on what, and what was not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
GIB = 2**30
HEAD = """# On a GPU

Made by `make gpu`: `benchmarks/gpu.py` measures everything that wants a GPU, and writes this page. **Planned** figures
are predictions that were written down before anything was measured; **measured** ones come from one file each in
`benchmarks/results/gpu/`. Where there is none, the page says so. cuBLAS' workspaces and the attention kernels are held
to those of consumer cards.
"""
CHANGED = """**The code has changed since these were measured.** Its predictions are declared in
`benchmarks/declared.json`: tensors {0:+.1%} to {1:+.1%} of those above. They are not measured yet.
"""


def write_page(folder: Path, declared: Path, names: Sequence[str]) -> None:
    """Write the page, of results and of what was declared before them; `declared` is what is declared today. Results of
    toy size are not shown.
    """
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names if _is_there(folder, name)}
    results = {name: result for name, result in found.items() if not result["toy"]}
    today, then = (json.loads(path.read_text()) for path in (declared, folder / declared.name))
    parts = [
        HEAD,
        _hardware(results),
        _small(results),
        _memory(then, results),
        *_changed(then["cases"], today["cases"]),
    ]
    PAGE.write_text("\n".join([*parts, _speed(results, names), _rest(results, names)]), encoding="utf-8")


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def _hardware(results: dict[str, Any]) -> str:
    keys = ("hardware", "torch", "bitsandbytes", "transformers", "date")
    seen = sorted({tuple(result[key] for key in keys) for result in results.values()})
    lines = [f"* {card}, torch {t}, bitsandbytes {b}, transformers {f}, {date}" for card, t, b, f, date in seen]
    return "\n".join(["## Hardware and versions", "", *(lines or ["**Nothing has been measured on a GPU yet.**"]), ""])


def _small(results: dict[str, Any]) -> str:
    """Quantisers, context, levers."""
    lines = ["## Bytes, context, levers", ""]
    for dtype, got in results["quantisers"]["result"].items() if "quantisers" in results else ():
        of = f"{got['bytes_that_differ']} bytes of {got['weights'] // 2}"
        lines.append(f"* NF4 of {dtype} weights: {of} differ from the CPU's.")
    if "context" in results and results["context"]["result"]["context"]:
        lines.append(f"* CUDA context: {results['context']['result']['context'] / 2**20:.0f} MiB (planned: 512).")
    if "levers" in results:
        lines += ["", "| a step with | loss | worst gradient | to the bit |", "|---|---|---|---|"]
        for name, got in results["levers"]["result"].items():
            same = "yes" if got["to_the_bit"] else "no"
            lines.append(f"| {name} | {got['loss']:.1e} | {got['gradients']:.1e} | {same} |")
    return "\n".join([*lines, *([] if len(lines) > 2 else ["Not measured."]), ""])


def _memory(declared: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [
        f"## Memory: declared on {declared['date']}, and measured",
        "",
        "Tensors: what torch's allocator handed out at the peak of two steps; process: with its gaps and the context.",
        "On a card: torch's allocator is held to what that card has. GiB.",
        "",
        "| case | card | tensors, planned | measured | | process, planned | measured | | runs, planned | seen | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in declared["cases"]:
        measured = results.get(f"memory-{case['name']}", {}).get("result")
        if measured is not None and measured.get("used") is not None:
            # what the driver says of this process alone, or else of one that only did a little of everything
            beside = measured["context"] or results["context"]["result"]["context"]
            measured["used"]["process"] = measured["used"]["reserved"] + beside
        lines.append(f"| {case['name']} | {case['card'] or ''} | {_case(case, measured)} |")
    return "\n".join([*lines, "", *_errors(declared["cases"], results), ""])


def _changed(then: list[dict[str, Any]], today: list[dict[str, Any]]) -> list[str]:
    """That today's predictions are others, where they are."""
    tensors = {case["name"]: case["tensors"] for case in today}
    changes = [tensors[case["name"]] / case["tensors"] - 1 for case in then if case["name"] in tensors]
    return [CHANGED.format(min(changes), max(changes))] if any(changes) else []


def _errors(cases: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    """The errors of all cases that were measured, in one paragraph."""
    measured = {case["name"]: results.get(f"memory-{case['name']}", {}).get("result") for case in cases}
    seen = [(case, measured[case["name"]]) for case in cases if measured[case["name"]] is not None]
    ran = [(case, result["used"]) for case, result in seen if result.get("used") is not None]
    if not ran:
        return []
    tensors, process = ([abs(case[key] / used[key] - 1) for case, used in ran] for key in ("tensors", "process"))
    verdicts = [case["runs"] == (result.get("used") is not None) for case, result in seen if case["runs"] is not None]
    return [
        f"Tensors: {max(tensors):.1%} off at worst. Process: {statistics.fmean(process):.1%} on average,"
        f" {max(process):.1%} at worst. Verdicts: {sum(verdicts)} of {len(verdicts)} right."
    ]


def _case(case: dict[str, Any], measured: dict[str, Any] | None) -> str:
    runs = {None: "", True: "yes", False: "no"}
    planned = [f"{case['tensors'] / GIB:.3f}", f"{case['process'] / GIB:.3f}"]
    if measured is None:
        return f"{planned[0]} | not measured | | {planned[1]} | not measured | | {runs[case['runs']]} | not seen | "
    used = measured.get("used")
    seen = used is not None
    verdict = "" if case["runs"] is None else ("right" if case["runs"] == seen else "**wrong**")
    cells = [["out of memory", ""], ["out of memory", ""]]
    if seen:
        cells = [
            [f"{used[key] / GIB:.3f}", f"{(case[key] - used[key]) / used[key]:+.1%}"] for key in ("tensors", "process")
        ]
    told = [f"{size} | {cell[0]} | {cell[1]}" for size, cell in zip(planned, cells, strict=True)]
    return " | ".join([*told, runs[case["runs"]], "yes" if seen else "no", verdict])


def _speed(results: dict[str, Any], names: Sequence[str]) -> str:
    lines = [
        "## Speed: time over that of PEFT LoRA r = 4",
        "",
        "LLaVA-1.5-7B's shapes, four of its 32 layers, 1,024 tokens; the median of the ratios within each round.",
        "By the clock, small batches measure the host.",
        "",
        "| | variant | layer | step | GPU time of the step, ms |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in names if name.startswith("speed")):
        if name not in results:
            lines.append(f"| {name} | | not measured | | |")
            continue
        got = results[name]["result"]
        for variant, layer in got["layer"].items():
            gpu = got["gpu_milliseconds"][variant]
            lines.append(
                f"| {name} | {variant} | {layer['ratio']:.2f} | {got['step'][variant]['ratio']:.2f} | {gpu:.1f} |"
            )
    return "\n".join([*lines, ""])


def _rest(results: dict[str, Any], names: Sequence[str]) -> str:
    lines = ["## The ladder and the demo", ""]
    if "ladder" in results:
        ladder = results["ladder"]["result"]
        for where in ("training", "loading"):
            got = ladder[where]
            lines.append(f"* Short of memory in {where}: changed {got['changed']}, then {got['ended']}.")
            lines.append(f"  Left on the card afterwards: {got['left']} bytes.")
    else:
        lines.append("* The ladder: not measured.")
    demo = results.get("demo", {}).get("result")
    lines.append("* The demo: not run." if demo is None else f"* The demo: exit {demo['exit']}.")
    return "\n".join([*lines, ""])
