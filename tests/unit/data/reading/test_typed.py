"""Typed columns are read as what they mean: classes by their names, numbers as short as their type has them."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from qmixlora.data.reading.json_files import Row
from qmixlora.data.reading.sources import Source

KIND = datasets.ClassLabel(names=["cat", "dog"])
FEATURES = datasets.Features(
    {
        "label": KIND,
        "labels": datasets.List(KIND),
        "turns": [{"role": datasets.Value("string"), "content": KIND}],
        "about": {"kind": KIND, "number": datasets.Value("int64")},
    }
)
NUMBERS = {
    "label": 1,
    "labels": [1, None, 0],
    "turns": [{"role": "user", "content": 0}],
    "about": {"kind": 1, "number": 1},
}
NAMES = {
    "label": "dog",
    "labels": ["dog", None, "cat"],
    "turns": [{"role": "user", "content": "cat"}],
    "about": {"kind": "dog", "number": 1},
}
NOTHING = {"label": -1, "labels": None, "turns": None, "about": None}  # -1 is what a test set without classes has


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def values(source: Path) -> list[object]:
    return [row.value if isinstance(row, Row) else row for row in Source.find(str(source), "train").rows()]


@pytest.mark.parametrize("container", ["saved", "file", "folder"])
def test_numbers_of_classes_are_their_names(container: str, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([NUMBERS, NOTHING], features=FEATURES)
    path = tmp_path / "set" / "train.parquet"
    if container == "saved":
        data.save_to_disk(str(path.parent))
    else:
        data.to_parquet(str(path))
    first, second = values(path if container == "file" else path.parent)
    assert first == NAMES
    assert isinstance(second, dict) and second["label"] is None and not second["labels"]


def test_folders_of_classes_are_their_names(tmp_path: Path) -> None:
    for name in KIND.names:
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "1.png")
    assert [row["label"] for row in values(tmp_path / "set") if isinstance(row, dict)] == KIND.names


WRITTEN = [0.1, 19.99, 3.0, None]


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()], ids=str)
def test_numbers_are_as_short_as_their_type_has_them(kind: pyarrow.DataType, tmp_path: Path) -> None:
    lists = [pyarrow.list_(kind), pyarrow.large_list(kind), pyarrow.list_(kind, len(WRITTEN))]
    columns = {str(index): pyarrow.array([WRITTEN], of) for index, of in enumerate(lists)}
    columns["number"] = pyarrow.array(WRITTEN[:1], kind)
    columns["object"] = pyarrow.array([{"x": {"y": WRITTEN}}], pyarrow.struct({"x": pyarrow.struct({"y": lists[0]})}))
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    short = [0.1, 19.98, 3.0, None] if kind == pyarrow.float16() else WRITTEN  # 19.984375, which 19.98 stands for
    expected = {**dict.fromkeys("012", short), "number": 0.1, "object": {"x": {"y": short}}}
    assert values(tmp_path / "a.parquet") == [expected]


def test_numbers_that_are_none_stay_so(tmp_path: Path) -> None:
    numbers = pyarrow.array([float("nan"), float("inf"), 1e20, 16777216.0], pyarrow.float32())
    parquet.write_table(pyarrow.table({"a": numbers}), tmp_path / "a.parquet")
    assert [str(row["a"]) for row in values(tmp_path / "a.parquet") if isinstance(row, dict)] == [
        "nan",
        "inf",
        "1e+20",
        "16777216.0",
    ]


def test_classes_whose_names_are_their_numbers_count_options_still(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["0", "1"])})
    datasets.Dataset.from_dict({"label": [1]}, features=features).save_to_disk(str(tmp_path / "saved"))
    (row,) = Source.find(str(tmp_path / "saved"), "train", None).rows()
    assert isinstance(row, Row) and row.value == {"label": 1}
