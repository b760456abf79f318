"""What reading data costs: time against a plain `json.load` of the same file, and memory over six rows.

    python benchmarks/data.py [--rows 200000] [--pictures 2000] [--form json|jsonl|parquet] [--kilobytes 0]

Makes LLaVA rows about small pictures in a temporary folder and reads them in processes of their own, with a cache of
their own: six rows, all rows at the first start, and all rows again; then the same for all that a run does before its
model is loaded (`checked`: every row looked at for the embedded model, and what there is to tell). `--kilobytes` puts
pictures of that size into the rows (Parquet alone). Prints JSON, and keeps it: CPU seconds (forked processes included),
seconds on the clock, the largest resident set of one process (mapped files included) and what is held in anonymous
memory at the end. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "data"
QUESTION = "<image>\nWhat is to be seen in picture {0}, and what colour has the thing in its middle, number {0}?"
ANSWER = "A thing of the kind {0}, which is red, and behind it a wall without windows, seen from below."
MEASURED = """
import json, os, sys, time
from pathlib import Path
import qmixlora.data, PIL.Image, torch
used = lambda: sum(os.times()[:4])
before, started = used(), time.time()
{work}
seconds, clock = used() - before, time.time() - started
status = Path("/proc/self/status").read_text()
kib = {{line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith("kB")}}
mib = {{"peak_mib": kib["VmHWM"] / 1024, "anonymous_mib": kib["RssAnon"] / 1024}}
print(json.dumps({{"seconds": seconds, "clock": clock, **mib}}))
"""
LOAD = "rows = qmixlora.data.load_conversations(sys.argv[1])\nassert rows[len(rows) - 1]['turns']"
CHECK = """from qmixlora.demo.backbone import make_processor
from qmixlora.recipe import Data, Train
collator = qmixlora.data.Collator(make_processor(), 2048)
before, started = used(), time.time()
qmixlora.data.taught(Data(train=sys.argv[1]), collator, ["train"]).facts(Train(micro_batch_size=8))"""
PLAIN = "rows = json.loads(Path(sys.argv[1]).read_text())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--form", choices=["json", "jsonl", "parquet"], default="json")
    parser.add_argument("--kilobytes", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = make(folder, 6, arguments)
        many = make(folder, arguments.rows, arguments)
        results = {"six": measured(LOAD, few, folder), "first": measured(LOAD, many, folder)}
        results["second"] = measured(LOAD, many, folder)
        for start in ("first", "second"):
            results[f"{start} checked"] = measured(CHECK, many, folder)
        if arguments.form == "json":
            plain = measured(PLAIN, many, folder)["seconds"]
            results["ratio"] = {key: results[key]["seconds"] / plain for key in ("first", "second")}
        results["over_six_mib"] = {
            key: results[key]["peak_mib"] - results["six"]["peak_mib"] for key in ("first", "second")
        }
    text = json.dumps({**vars(arguments), **results}, indent=2)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.form}-{arguments.rows}-{arguments.kilobytes}.json").write_text(text + "\n")
    print(text)


def make(folder: Path, rows: int, arguments: argparse.Namespace) -> Path:
    """A file of LLaVA rows, and the pictures that they name."""
    from PIL import Image

    names = [f"{index}.png" for index in range(min(rows, arguments.pictures))]
    for index, name in enumerate(names):
        Image.new("RGB", (64, 48), (index % 256, 0, 0)).save(folder / name)
    samples = (row(index, names[index % len(names)]) for index in range(rows))
    path = folder / f"{rows}.{arguments.form}"
    if arguments.form == "parquet":
        write_parquet(path, samples, arguments.kilobytes)
    else:
        separator, ends = (",\n", "[]") if arguments.form == "json" else ("\n", ("", ""))
        with path.open("w", encoding="utf-8") as file:
            file.write(ends[0])
            for index, sample in enumerate(samples):
                file.write((separator if index else "") + json.dumps(sample))
            file.write(ends[1])
    return path


def row(index: int, image: str) -> dict[str, Any]:
    question, answer = QUESTION.format(index), ANSWER.format(index)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(index), "image": image, "task": f"task {index % 10}", "conversations": turns}


def write_parquet(path: Path, samples: Any, kilobytes: int) -> None:
    """Rows in groups of 1000; with `kilobytes` each holds a picture of that size, of bytes that do not compress."""
    import pyarrow
    from pyarrow import parquet

    header = (path.parent / "0.png").read_bytes()
    writer, batch = None, []
    for sample in samples:
        if kilobytes:
            sample["image"] = {"bytes": header + os.urandom(kilobytes << 10), "path": None}
        batch.append(sample)
        if len(batch) == 1000:
            table = pyarrow.Table.from_pylist(batch)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            batch = []
    table = pyarrow.Table.from_pylist(batch) if batch else None
    writer = writer or parquet.ParquetWriter(path, table.schema)
    if table is not None:
        writer.write_table(table)
    writer.close()


def measured(work: str, path: Path, folder: Path) -> dict[str, float]:
    """What a process that does this with a file took."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED.format(work=work), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
