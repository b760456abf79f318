"""Files, folders and data sets of all kinds give the same rows."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from qmixlora.data.reading.json_files import Row
from qmixlora.data.reading.sources import Source
from qmixlora.errors import UserError

ROWS = [{"q": "one, two", "a": 'say "x"\nplease'}, {"q": "\u2028ü", "a": "3"}]
CSV = '\ufeffq,a\r\n"one, two","say ""x""\nplease"\r\n\r\n\u2028ü,3\r\n'
TSV = CSV.replace(",3", "\t3").replace("q,a", "q\ta").replace('","', '"\t"')
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(path: Path, split: str = "train") -> list[object]:
    return [row.value if isinstance(row, Row) else str(row) for row in Source.find(str(path), split).rows()]


def saved(path: Path, text: str) -> Path:
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def to_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def to_saved_set(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "set"))
    return folder / "set"


def to_saved_splits(folder: Path) -> Path:
    both = {"train": datasets.Dataset.from_list(ROWS), "other": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(str(folder / "splits"))
    return folder / "splits"


def to_folder_of_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    saved(folder / "files" / "train.jsonl", LINES)
    return folder / "files"


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "json": lambda folder: saved(folder / "a.json", json.dumps(ROWS)),
    "object": lambda folder: saved(folder / "a.json", json.dumps({"version": 1, "data": ROWS})),
    "jsonl": lambda folder: saved(folder / "a.jsonl", LINES),
    "ndjson": lambda folder: saved(folder / "a.NDJSON", LINES),
    "json.gz": lambda folder: saved(folder / "a.json.gz", json.dumps(ROWS)),
    "jsonl.gz": lambda folder: saved(folder / "a.jsonl.gz", LINES),
    "csv": lambda folder: saved(folder / "a.csv", CSV),
    "csv.gz": lambda folder: saved(folder / "a.csv.gz", CSV),
    "tsv": lambda folder: saved(folder / "a.tsv", TSV),
    "parquet": to_parquet,
    "saved set": to_saved_set,
    "saved splits": to_saved_splits,
    "folder of files": to_folder_of_files,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_same_rows(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert rows_of(make(tmp_path)) == ROWS


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_of_pictures_has_their_metadata(metadata: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    row = {"file_name": "x.png", "q": "what ?", "a": "seven"}
    table = f"{','.join(row)}\n{','.join(row.values())}\n"
    saved(folder / metadata, table if metadata.endswith("csv") else json.dumps(row))
    [value] = rows_of(folder, split="test")  # the folder has no splits: it is the data of any
    assert isinstance(value, dict) and value["a"] == "seven"
    assert Path(value["image"]["path"]) == folder / "x.png" and value["image"]["bytes"] is None


# what a library that guesses types makes of them: 501, 3.1, null, null, null, True, a number that is rounded
CELLS = ["00501", "3.10", "NA", "None", "null", "True", "12345678901234567890123"]


@pytest.mark.parametrize("cells", [[cell] for cell in CELLS] + [CELLS], ids=[*CELLS, "all"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.csv.gz", "metadata.csv", "sub/metadata.csv"])
def test_every_cell_of_a_table_in_a_folder_is_a_text(name: str, cells: list[str], tmp_path: Path) -> None:
    table = tmp_path / "set" / name
    table.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(table.parent / "x.png") if "metadata" in name else None
    rows = [("file_name", "a"), *(("x.png", cell) for cell in cells)]
    saved(table, "".join(("\t" if "tsv" in name else ",").join(row) + "\n" for row in rows))
    values = rows_of(tmp_path / "set")
    assert [value["a"] for value in values if isinstance(value, dict)] == cells


@pytest.mark.parametrize("name", ["data.csv", "metadata.csv"])
def test_a_typed_table_in_the_cache_of_the_library_is_not_used(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "x.png") if name == "metadata.csv" else None
    saved(folder / name, "file_name,a\nx.png,00501\n")
    [typed] = datasets.load_dataset(str(folder))["train"]
    [value] = rows_of(folder)
    assert isinstance(value, dict) and (typed["a"], value["a"]) == (501, "00501")


CLASSES = "{class_label: {names: {'0': cat, '1': dog}}}"


@pytest.mark.parametrize(
    ("dtype", "cell", "read"), [(CLASSES, "1", "dog"), ("string", "01", "01"), ("int64", "01", "01")]
)
def test_a_table_in_a_folder_whose_card_has_types(dtype: str, cell: str, read: str, tmp_path: Path) -> None:
    saved(tmp_path / "data.csv", f"a\n{cell}\n")
    saved(tmp_path / "README.md", f"---\ndataset_info:\n  features:\n  - name: a\n    dtype: {dtype}\n---\n")
    assert rows_of(tmp_path) == [{"a": read}]


@pytest.mark.parametrize("name", ["train.csv.zip", "train.zip"])
def test_a_packed_table_in_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("train.csv", "q,a\n1,00501\n")
    with pytest.raises(UserError, match="A table in a folder") as caught:
        rows_of(tmp_path)
    assert caught.value.where.endswith(name)


def test_a_table_in_a_folder_is_read_as_the_card_says(tmp_path: Path) -> None:
    saved(tmp_path / "data.csv", "q;a\n1;00501\n")
    configs = "configs:\n- config_name: default\n  data_files: data.csv\n  sep: ';'\n"
    saved(tmp_path / "README.md", f"---\n{configs}---\n")
    assert rows_of(tmp_path) == [{"q": "1", "a": "00501"}]


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (["a.jsonl", "b.csv", "c.csv"], "a.jsonl"),
        (["train.csv", "more.csv"], "more.csv"),
        (["train.csv", "test.csv", "sub/extra.tsv"], "sub/extra.tsv"),
    ],
)
def test_a_folder_of_which_files_would_not_be_read_is_refused(files: list[str], left: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "set" / name, LINES if name.endswith("jsonl") else "q,a\n1,2\n")
    with pytest.raises(UserError, match="would not be read") as caught:
        rows_of(tmp_path / "set")
    assert caught.value.what.endswith(f": {left}.")
    (tmp_path / "set" / left).unlink()
    assert rows_of(tmp_path / "set")


def test_what_is_hidden_in_a_folder_or_describes_it_is_no_data(tmp_path: Path) -> None:
    for name in (".cache/state.json", "__pycache__/a.json", "dataset_info.json"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "set" / name, "{}")
    saved(tmp_path / "set" / "a.csv", "q,a\n1,2\n")
    assert rows_of(tmp_path / "set") == [{"q": "1", "a": "2"}]


def test_a_table_beside_pictures_that_is_not_called_metadata_is_not_ignored(tmp_path: Path) -> None:
    for name in "xyz":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    saved(tmp_path / "data.csv", "image,a\nx.png,1\n")
    with pytest.raises(UserError, match=r"would not be read: data\.csv"):
        rows_of(tmp_path)


def test_metadata_name_several_pictures_from_their_own_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in "xy":
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / f"{name}.png")
    saved(tmp_path / "train" / "metadata.csv", "left_file_name,file_name,a\nx.png,y.png,1\nx.png,,2\n")
    both = [{"bytes": None, "path": str(tmp_path / "train" / f"{name}.png")} for name in "xy"]
    first, second = {"left": both[0], "image": both[1], "a": "1"}, {"left": both[0], "image": None, "a": "2"}
    assert rows_of(tmp_path) == [first, second]


def test_metadata_that_name_no_pictures_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    saved(tmp_path / "metadata.csv", "file,a\nx.png,1\n")
    with pytest.raises(UserError, match="no column file_name"):
        rows_of(tmp_path)


def test_a_folder_whose_table_changes_is_another_source(tmp_path: Path) -> None:
    table = tmp_path / "set" / "data.csv"
    table.parent.mkdir()
    found = [Source.find(str(saved(table, text).parent), "train") for text in ("q,a\n1,2\n", "q,a\n1,20\n")]
    assert found[0].state != found[1].state and [source.size for source in found] == [8, 9]


@pytest.mark.parametrize("make", [to_saved_splits, to_folder_of_files])
def test_a_split_that_is_missing_is_named_with_those_that_are_there(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no split 'test'") as caught:
        rows_of(make(tmp_path), split="test")
    assert "It has: train" in caught.value.fix


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize("name", ["json.gz", "jsonl.gz", "csv.gz", "parquet"])
def test_a_file_that_is_cut_short_is_named(name: str, tmp_path: Path) -> None:
    path = cut(CONTAINERS[name](tmp_path))
    with pytest.raises(UserError) as caught:
        rows_of(path)
    assert path.name in caught.value.where


def test_a_file_that_is_not_zipped_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_text("[]")
    with pytest.raises(UserError, match=r"broken or cut short: Not a gzipped file"):
        rows_of(tmp_path / "a.json.gz")


@pytest.mark.parametrize("name", ["a.txt", "a.zip", "a.gz", "a"])
def test_a_file_of_an_unknown_kind_is_named_with_those_that_are_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.json, \.jsonl") as caught:
        rows_of(saved(tmp_path / name, "x"))
    assert name in caught.value.where


@pytest.mark.parametrize("name", ["none.json", "none.csv.gz", "no such set"])
def test_a_source_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path / name)
    assert name in caught.value.where
