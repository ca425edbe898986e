"""Where preference rows come from: tables, Python lists and dicts, files, directories and the Hub.

Json and csv files are read by Python's own parsers, so that the text in them stays text (table readers turn a column of
"2020-01-01" into dates and "None" into a missing value) and a broken file is reported by its line.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError

from fastdpo.rows import COMPLETION_COLUMNS, ID_COLUMNS, IMAGE_COLUMNS, OPTION_COLUMNS, TEXT_COLUMNS

# What Arrow and datasets raise for cells that they cannot hold: lone surrogates, huge numbers, bytes beside text, ...
NO_ARROW = (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError)
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# What makes a Dataset of other libraries' tables, by the library
REMEDIES = {
    "pandas": "Dataset.from_pandas(table, preserve_index=False)",
    "polars": "Dataset.from_polars(table)",
    "pyarrow": "Dataset(table)",
}


def load_rows(source: Any, split: str, name: str) -> Dataset | IterableDataset:
    """Any supported source as a table of raw rows; `split` picks from a DatasetDict or a Hub dataset.

    `name` (train, eval) is for messages.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        rows = source
    elif isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise ValueError(f"The {name} dataset has no split {split!r}, only {', '.join(map(repr, source))}.")
        rows = source[split]
    elif isinstance(source, (str, Path)):
        rows = _load_path_or_name(source, split, name)
    elif isinstance(source, dict) and all(isinstance(column, (list, tuple)) for column in source.values()):
        rows = _table({column: list(values) for column, values in source.items()}, f"The {name} dataset")
    elif isinstance(source, (list, tuple)):
        rows = _table(_columns(source, f"The {name} dataset"), f"The {name} dataset")
    else:
        remedy = REMEDIES.get(type(source).__module__.partition(".")[0])
        raise ValueError(
            f"The {name} dataset is of type {type(source).__name__}; expected a datasets.Dataset, IterableDataset or "
            "DatasetDict, a dict of columns, a list of rows, a path to a jsonl, json, parquet or csv file, or the name "
            f"of a dataset on the Hub.{f' Give datasets.{remedy}.' if remedy else ''}"
        )
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"The {name} dataset is empty: it has no rows.")
    return rows


def _load_path_or_name(source: str | Path, split: str, name: str) -> Dataset | IterableDataset:
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_directory(path, split, name)
    if path.exists():
        return _load_file(path, f"The {name} dataset {path}")
    text = str(source)
    if isinstance(source, Path) or path.suffix in DATA_SUFFIXES or text[:1] in ("/", ".", "~") or text.count("/") > 1:
        raise FileNotFoundError(f"The {name} dataset {text} does not exist (looked in {Path.cwd()}).")
    try:
        return datasets.load_dataset(text, split=split)  # type: ignore[return-value]
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"The {name} dataset {text!r} is neither a file here nor could its split {split!r} be loaded from the "
            f"Hugging Face Hub: {error}"
        ) from error


def _load_directory(path: Path, split: str, name: str) -> Dataset | IterableDataset:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return load_rows(datasets.load_from_disk(str(path)), split, name)
    try:
        return datasets.load_dataset(str(path), split=split)  # type: ignore[return-value]
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"The {name} dataset {path} is a directory that neither save_to_disk made nor load_dataset can read as "
            f"split {split!r}: {error}"
        ) from error


def _load_file(path: Path, what: str) -> Dataset:
    """Read one file whole. Tables that do not fit in memory are better given as a Dataset, which maps its file."""
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise ValueError(f"{what} has the suffix {suffix!r}; expected one of {', '.join(DATA_SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{what} is empty.")
    if suffix == ".parquet":
        try:
            if pq.read_metadata(path).num_rows:
                return Dataset.from_parquet(str(path))  # type: ignore[return-value]
        except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
            raise ValueError(f"{what} cannot be read as parquet: {error.__cause__ or error}") from error
        raise ValueError(f"{what} is empty: it has no rows.")
    csv.field_size_limit(2**31 - 1)  # its default, 128k, is less than a long document in a prompt
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _parse_csv(file, what) if suffix == ".csv" else _parse_json(file.read(), what)
    except csv.Error as error:
        raise ValueError(f"{what} cannot be read as csv: {error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} cannot be read as {suffix[1:]}: {_no_text(path)}.") from error
    columns = rows if isinstance(rows, dict) else _columns(rows, what)
    for column in IMAGE_COLUMNS:
        if column in columns:
            columns[column] = [_beside(path, value) for value in columns[column]]
    return _table(columns, what)


def _beside(file: Path, value: Any) -> Any:
    """Paths of images as they are seen from the folder of the file that names them."""
    if isinstance(value, list):
        return [_beside(file, part) for part in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": _beside(file, value["path"])}
    return str(file.parent / value) if isinstance(value, str) and "://" not in value else value


def _no_text(path: Path) -> str:
    """Why a file is no UTF-8, with the remedy."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        return "it is compressed (gzip): unpack it"
    before = re.split("[\udc80-\udcff]", content.decode(errors="surrogateescape"), maxsplit=1)[0]
    return f"line {1 + before.count(chr(10))} is not UTF-8: save the file as UTF-8"


def _parse_csv(file: TextIO, what: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or ()
    if twice := [column for column, times in Counter(names).items() if times > 1 and column]:
        raise ValueError(f"{what} has the column {twice[0]!r} more than once: rename or remove all but one.")
    rows: list[dict[Any, Any]] = []
    for row in reader:
        if None in row:  # where DictReader puts the fields that are too many
            raise ValueError(
                f"{what}: the row that ends in line {reader.line_num} has {len(names) + len(row[None])} fields, and "
                f'the header {len(names)}: put "quotes" around fields with commas in them, and end no row with one.'
            )
        rows.append(row)
    return rows


def _parse_json(text: str, what: str) -> Any:
    """A json array, a dict of columns, or one row a line, whichever of .json and .jsonl the file is called."""
    whole = text.lstrip()[:1] == "["
    parts = [(1, text)] if whole else [part for part in enumerate(text.split("\n"), 1) if part[1].strip()]
    parsed = []
    for number, part in parts:
        try:
            parsed.append(json.loads(part, object_pairs_hook=_object))
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise ValueError(f"{what} is not valid json in line {line}, column {error.colno}: {error.msg}.") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists, ...
            where = "somewhere" if whole else f"in line {number}"
            raise ValueError(f"{what} holds what is no row {where}: {_in_a_line(error)}") from error
    if whole:
        return parsed[0]
    return parsed[0] if len(parsed) == 1 and _is_columns(parsed[0]) else parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice!r} more than once: remove all but one.")
    return found


def _is_columns(row: Any) -> bool:
    """A single json object holds columns, not one row of messages or token ids, if its answers are lists of rows."""
    answers = row.get("chosen", row.get(COMPLETION_COLUMNS[0])) if isinstance(row, dict) else None
    return isinstance(answers, list) and len(answers) > 0 and isinstance(answers[0], (str, list))


def _columns(rows: Sequence[Any], what: str) -> dict[str, list]:
    """Columns from rows; a key that only some rows have is None in the others."""
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{what}: row {index} is of type {type(row).__name__}, expected a dict of columns.")
    names = dict.fromkeys(column for row in rows for column in row)
    return {column: [row.get(column) for row in rows] for column in names}


def _table(columns: dict[str, list], what: str) -> Dataset:
    lengths = {column: len(values) for column, values in columns.items()}
    if not any(lengths.values()):
        raise ValueError(f"{what} is empty: it has no rows.")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{what} has columns of different lengths: {lengths}.")
    known = [column for column in (*TEXT_COLUMNS, *ID_COLUMNS, *OPTION_COLUMNS, *IMAGE_COLUMNS) if column in columns]
    if {"chosen", "rejected"} <= set(known) or set(ID_COLUMNS) <= set(known):
        columns = {column: columns[column] for column in known}  # the others may hold what Arrow cannot
    try:
        return _arrow(columns)
    except NO_ARROW as error:
        for column, values in columns.items():
            try:
                _arrow({column: values})
            except NO_ARROW as reason:
                raise ValueError(f"{what} cannot be made a table: column {column!r}: {_in_a_line(reason)}") from error
        raise ValueError(f"{what} cannot be made a table: {_in_a_line(error)}") from error


def _arrow(columns: dict[str, list]) -> Dataset:
    """A wrong type in one row stays visible as such, and is reported with its row when that is read."""
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def _in_a_line(error: Exception) -> str:
    """What another library says, in printable text."""
    text = " ".join(str(error).split())[:300]
    text = text.replace("use sys.set_int_max_str_digits() to increase the limit", "give it as a string or not at all")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
