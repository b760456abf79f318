"""Sources of data: files and data sets, read row by row, each row with its place for messages."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow
from datasets.data_files import FILES_TO_IGNORE
from datasets.info import DatasetInfosDict
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.constants import HF_HUB_CACHE
from pyarrow import parquet

from qmixlora.errors import UserError, path_meant, some
from qmixlora.progress import reading, tracked

from .json_files import Row, Rows, read_json, read_json_lines
from .text_tables import read_table_text
from .typed import meant_by

BATCH = 32  # rows that are taken out of a table at a time; each may hold pictures
LISTED = 5  # files that are named
PIECE = 1 << 20  # bytes of a Parquet file that are read at a time


@dataclass(frozen=True)
class Source:
    """Where rows come from. `state` changes when its content does; `size` is in bytes; relative image paths start from
    `folder`; in `image_folders` the library that reads a data set keeps its images, whatever the rows say.
    """

    name: str
    folder: Path
    size: int
    state: object
    rows: Callable[[], Rows]
    image_folders: tuple[Path, ...] = ()

    @classmethod
    def find(cls, source: str, split: str, subset: str | None = None) -> Source:
        """The source of a file, a folder or a data set on the hub; the kinds are in docs/data.md. `subset` is one of
        the configurations of a data set.

        `rows` yields what is wrong with one row in its place, and raises UserError for what is wrong with the whole.

        Raises:
            UserError: it is missing, cannot be loaded, or has no such subset or split.
        """
        path = Path(source)
        if _form(path) not in READERS:
            if path.is_file():
                known = ", ".join(READERS)
                raise UserError(
                    f"Data files end in {known}, or in one of these and .gz.", where=source, fix="Rename or convert it."
                )
            data = _data_set(source, split, subset)
            folder = path if path.is_dir() else Path()
            name = str(path.resolve()) if path.is_dir() else source
            if isinstance(data, Tables):
                state = [(str(file), *_state(file)) for file in data.files]
                return cls(name, folder, sum(size for _, size, _ in state), state, data.rows, (folder,))
            rows = lambda: _of_data_set(data, source)  # noqa: E731  # as for files
            return cls(name, folder, data.data.nbytes, data._fingerprint, rows, (folder, *_caches()))
        if not path.is_file():
            fix = path_meant(path) or "Check the path."
            raise UserError("There is no such data file.", where=source, fix=fix)
        _refuse(subset, source)
        size, changed = _state(path)
        return cls(str(path.resolve()), path.parent, size, (size, changed), lambda: _file_rows(path))


@dataclass(frozen=True)
class Tables:
    """Tables of text (CSV) that are one split of a folder, and what reads them. In an `imagefolder` they are metadata:
    columns `file_name` and `..._file_name` name pictures, `image_column` is what the first is called in the rows.
    """

    files: list[Path]
    read: Callable[[Any, str], Rows]
    image_column: str | None

    @classmethod
    def of(cls, builder: datasets.DatasetBuilder, split: str) -> Tables | None:
        """Those of a split that the library would read by guessing the types of cells (`00501` is 501 there, and `NA`
        is null); None if it has none, or its card names classes or says how they are read.
        """
        files = [Path(file) for file in builder.config.data_files[split]]
        # not builder.info, which has the types that the library once guessed
        by_card = DatasetInfosDict.from_directory(builder.base_path).get(builder.config.name)
        if by_card is not None and "ClassLabel" in repr(by_card.features):
            return None
        if isinstance(builder, ImageFolder):
            files = [file for file in files if file.name in builder.METADATA_FILENAMES]
            is_text = bool(files) and not builder.config.drop_metadata and all(_form(file) == ".csv" for file in files)
            return cls(files, read_table_text(","), builder.BASE_COLUMN_NAME) if is_text else None
        if not isinstance(builder, Csv):
            return None
        separator = builder.config.sep
        usual = CsvConfig(sep=separator).pd_read_csv_kwargs == builder.config.pd_read_csv_kwargs
        if not usual or len(separator) != 1:
            return None
        packed = next((file for file in files if _form(file) not in READERS), None)
        if packed is not None:
            raise UserError("A table in a folder is a file, or one and .gz.", where=str(packed), fix="Unpack it.")
        return cls(files, read_table_text(separator), None)

    def rows(self) -> Rows:
        for file in self.files:
            for row in _file_rows(file, self.read):
                yield row if self.image_column is None or isinstance(row, UserError) else self._with_images(row, file)

    def _with_images(self, row: Row, file: Path) -> Row:
        value: dict[str, Any] = {}
        named = False
        for column, cell in row.value.items():
            if column == "file_name" or column.endswith("_file_name"):
                named = True
                path = {"bytes": None, "path": str(file.parent / cell)} if cell else None
                value[column.removesuffix("file_name").removesuffix("_") or str(self.image_column)] = path
            else:
                value[column] = cell
        if not named:
            fix = "Name the column of pictures so."
            raise UserError(
                "The table has no column file_name, nor one that ends in _file_name.", where=str(file), fix=fix
            )
        return Row(row.where, value)


def _state(path: Path) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _form(path: Path) -> str:
    """The suffix that tells how a file is read, in small letters and without `.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _file_rows(path: Path, read: Callable[[Any, str], Rows] | None = None) -> Rows:
    """The rows of a file, as its suffix tells or as `read` has them."""

    def rows() -> Rows:
        unpacked = gzip.open if path.suffix.lower() == ".gz" else nullcontext
        with reading(path) as raw, unpacked(raw) as file:
            yield from (read or READERS[_form(path)])(file, str(path))

    return _until_broken(rows(), str(path))


def _until_broken(rows: Rows, source: str) -> Rows:
    """The rows; what a library finds wrong with the file between them is the user's, with the last place known."""
    last = f"{source}, at its beginning"
    try:
        for row in rows:
            yield row
            last = f"after {row.where}"
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"The data file is broken or cut short: {error}", where=last) from None


def _read_parquet(_: BinaryIO, name: str) -> Rows:
    # buffered: a piece of a page at a time; a page may hold a thousand pictures
    with parquet.ParquetFile(name, pre_buffer=False, buffer_size=PIECE) as table:
        yield from _rows_of(table.iter_batches(BATCH), table.schema_arrow, name, table.metadata.num_rows)


def _rows_of(batches: Iterable[Any], schema: pyarrow.Schema, name: str, count: int) -> Rows:
    meant = meant_by(schema)
    values = tracked((value for batch in batches for value in batch.to_pylist()), "reading data", count)
    return (Row(f"{name}, row {index} (from 0)", meant(value)) for index, value in enumerate(values))


def _refuse(subset: str | None, source: str) -> None:
    if subset is not None:
        raise UserError(
            f"Only data sets with configurations have subsets such as {subset!r}.",
            where=source,
            fix="Remove it, or give it to the part of data.train that has it.",
        )


def _data_set(source: str, split: str, subset: str | None) -> datasets.Dataset | Tables:
    folder = Path(source)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved:
        _refuse(subset, source)
    try:
        if saved:
            data = datasets.load_from_disk(source)
            return data if isinstance(data, datasets.Dataset) else data[_chosen(data, split, source)]
        if not folder.is_dir():
            return datasets.load_dataset(source, subset, split=split)
        builder = datasets.load_dataset_builder(source, subset)
        _check_all_read(folder, builder)
        chosen = _chosen(builder.config.data_files, split, source)
        tables = Tables.of(builder, chosen)
        if tables is not None:
            return tables
        builder.download_and_prepare()
        return builder.as_dataset(chosen)
    except UserError:
        raise
    except Exception as error:  # many kinds, from many libraries
        have = f"Check data.{split}: a data file, a folder, or a data set on the hub."
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            have = "Name one of them with subset, beside data.train or in a part of it."
        raise UserError(f"Cannot load the data set: {error}", where=source, fix=have) from None


def _check_all_read(folder: Path, builder: datasets.DatasetBuilder) -> None:
    """Raise UserError for data files of a folder that are in none of its splits: the library reads one kind of files,
    the most frequent, and of a folder that names splits the files of these. A card that names files is taken at its
    word.
    """
    if _names_files(folder):
        return
    read = {Path(file).resolve() for files in builder.config.data_files.values() for file in files}
    left = [
        path
        for path in sorted(folder.rglob("*"))
        if _form(path) in READERS
        and path.name not in FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and path.is_file()
        and path.resolve() not in read
    ]
    if not left:
        return
    names = some([path.relative_to(folder).as_posix() for path in left], LISTED)
    raise UserError(
        f"These data files of the folder would not be read: {names}.",
        where=str(folder),
        fix="Name the files to read in place of the folder, several as a list of parts, or move the others out.",
    )


def _chosen(splits: Iterable[Any], split: str, source: str) -> str:
    """The split to be read of those that a folder has. Raises UserError if it is not among them."""
    names = [str(name) for name in splits]
    if split in names:
        return split
    if names == ["train"] and not _names_a_split(Path(source)):
        return "train"
    raise UserError(f"The data set has no split {split!r}.", where=source, fix=f"It has: {', '.join(names)}.")


def _caches() -> tuple[Path, ...]:
    """The folders that the hub's files and unpacked archives are put into."""
    config = datasets.config
    names = (HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    return tuple(Path(name) for name in names)


def _of_data_set(data: datasets.Dataset, source: str) -> Rows:
    """The rows of a data set, of which nothing is decoded: pictures stay files."""
    return _rows_of(data.with_format("arrow").iter(BATCH), data.features.arrow_schema, source, len(data))


def _names_a_split(folder: Path) -> bool:
    """Whether the files of a folder are for training by their names, or by its card; otherwise `datasets` has made the
    word up.
    """
    return _names_files(folder) or any("train" in str(path.relative_to(folder)).lower() for path in folder.rglob("*"))


def _names_files(folder: Path) -> bool:
    """Whether a folder's card names the files of its splits."""
    card = folder / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")


READERS: dict[str, Callable[[Any, str], Rows]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_table_text(","),
    ".tsv": read_table_text("\t"),
    ".parquet": _read_parquet,
}
