"""Make docs/families.md by a run over variants: `python -m tests.families.table [NAME]...` (some minutes).

Outcomes are kept in benchmarks/results/families.json, so that a new family need not wait for the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import transformers

from .outcomes import WORKS, outcomes
from .stages import STAGES
from .variant import variants

ROOT = Path(__file__).parents[2]
DOCUMENT, RESULTS = ROOT / "docs" / "families.md", ROOT / "benchmarks" / "results" / "families.json"
HEAD = """# Families

Every model that `AutoModelForImageTextToText` loads goes the same way through qmixlora, as far as its parts can be told
apart. What is known to work was tried: below, each row is one class of models as a tiny random checkpoint with its real
processor class, made from the file of its name in `tests/families/variants/`. It went through the stages of the columns
(`tests/families/stages.py` says what each asserts), in NF4 on a CPU. Weights were random: this says that the parts fit
together and compute what they should, not how well a model learns.

This page is written by `python -m tests.families.table` and not by hand. To add a family, add one file of facts there.

`+` works · `-` is refused by name before or in that stage, for the reason below the table · `!` fails.
"""


TAIL = """
## What else is refused, and what has no row

By its config alone, before anything else is read: encoder-decoders (Florence-2, Pix2Struct, T5Gemma 2, UDOP,
PP-FormulaNet, vision-encoder-decoder), DiffusionGemma, which writes blocks out of noise, ShieldGemma 2, PI0 and Evolla;
models whose class is code of their repository, with what transformers has of the family (MiniCPM-V before 4.6,
DeepSeek-OCR, InternVL in its own form, LLaVA in its own form). Classes without an image encoder beside the decoder
(GIT, Gemma 4 Unified, Mistral 4) are refused as Fuyu is. A LoRA is not exported where stock PEFT would look for it
under other names and load none of it (DeepSeek-OCR 2, Unlimited-OCR): a run, and a merged checkpoint, hold the same.

Without a row, since no checkpoint of theirs was small enough, or whole, here: Gemma 3n, FastVLM and Perception-LM
(towers of timm's, which is to be installed beside), HunYuan-VL and Step 3.7 (they train; a tensor of the former's
projector is never used, and the latter takes a third more than is planned), Inkling, Inkling 2, Muse Spark, Dots 3,
GLM-5, Mistral Large 4 and Nemotron-H Omni.

## Experts

Experts that a class holds as one parameter are in NF4 with double quantisation, frozen and not adapted: attention,
shared experts and dense layers are. Each expert's matrix is dequantised for its own product, forward and backward,
and none is kept; a class that multiplies with all at once (Llama 4) dequantises a layer's. The class' own loop over
experts is used, not transformers' fused kernels, which read all weights in 16 bits. Reloading is exact; LoRA exports
are ordinary ones on attention; a merged checkpoint has its experts as the base stores them. A Qwen3-VL-30B-A3B is
planned at 19.6 GiB (`qwen3-vl-30b-a3b-rtx3090-24gb`, which `qmixlora recipes check` plans on a card of 24 GB);
nothing of that size was run. `adapter.target_modules` leaves out
layers whose names stock PEFT takes for experts (GLM-4.5V's dense and shared ones): an adapter on them could not be
loaded. Experts whose matrices are no whole blocks of 64 weights would stay in 16 bits: such a model is refused, and
they are named.

## What four bits do

`qmixlora doctor --model M --nf4` measures it on a model's own weights, kind of layer by kind of layer, with `--data`
on the outputs too; `model.keep: [...]` holds layers in 16 bits (they are adapted all the same). NF4 with blocks of 64
is 9 to 10 % off on normally distributed weights, whatever the layer.

Qwen3.5 was looked at with **random weights** only (the variant above, four samples): weights 9.1 to 9.7 % off in
every kind, outputs 9.0 to 9.6 %; of the linear attention `in_proj_a` (outputs 11.6 %) and `in_proj_b` (10.1 %), which
set how fast the state decays and is written, are the worst, and hold 0.1 % of the weights. `conv1d`, `A_log`,
`dt_bias` and norms are never quantised. So nothing in its layers' shapes forbids four bits; `model.keep: [in_proj_a,
in_proj_b]` costs next to nothing. Whether the published weights have outliers that change this is not known here:
measure them before a long run.
"""


def page(results: dict[str, dict[str, str]]) -> str:
    """The document for outcomes by variant and stage."""
    names = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft", "bitsandbytes")]
    whole = sum(set(row.values()) == {WORKS} for row in results.values())
    lines = [HEAD, f"{len(results)} variants, {whole} of them in every stage ({', '.join(names)}).", ""]
    lines += [f"| variant | {' | '.join(STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
    notes = []
    for name, row in results.items():
        signs = ["+" if row[stage] == WORKS else "-" if row[stage].startswith("refused") else "!" for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(signs)} |")
        reasons: dict[str, list[str]] = {}
        for stage, outcome in row.items():
            if outcome != WORKS:
                reasons.setdefault(" ".join(outcome.split()), []).append(stage)
        for reason, stages in reasons.items():
            where = "every stage" if len(stages) == len(STAGES) else ", ".join(stages)
            notes.append(f"- **{name}** ({where}): {reason}")
    return "\n".join([*lines, "", "## What does not work, and why", "", *notes, TAIL])


def _prepare() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _outcomes(name: str) -> dict[str, str]:
    told = outcomes(variants()[name])
    bad = [stage for stage, outcome in told.items() if outcome != WORKS]
    print(f"{name}: {', '.join(bad) or 'all'}", file=sys.stderr, flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="variants to run (default: those whose outcomes are not kept yet)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    names = list(variants())
    wanted = arguments.names or [name for name in names if name not in kept]
    with ProcessPoolExecutor(arguments.jobs, initializer=_prepare) as pool:
        running = {pool.submit(_outcomes, name): name for name in wanted}
        for done in as_completed(running):
            kept[running[done]] = done.result()
            RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(page({name: kept[name] for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
