"""Reads local json, jsonl and csv files, and keeps every value exactly as it is written.

No type is guessed. Text stays text, even if other rows have another type in the same column. Every cell of a csv file
is text. Rows are read in chunks. A large file is copied to an Arrow file in the cache, which is mapped into memory and
not loaded.

Read next: `splits.py`, which decides which files a dataset has.
"""

import csv
import hashlib
import json
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Json, List, Value
from datasets.utils.json import ujson_loads

from renyi.data.rows import FILE_COLUMN, ROW_COLUMN
from renyi.errors import DataError
from renyi.files import opened_whole

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_LARGE = 64 * 2**20  # rows of larger files (in bytes) are not held in memory
_CHUNK = 1000  # rows
_VERSION = 1  # version of the files in the cache


def read_files(files: Sequence[Path], streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of json, jsonl and csv files, one file after the other.

    A dataset of several files has the columns `FILE_COLUMN` and `ROW_COLUMN`, so that a message can name a row.

    Args:
        files: not empty; each ends with .json, .jsonl or .csv.
        streaming: whether to read rows only when they are needed.

    Raises:
        DataError: a file cannot be read; the message names the line. A streamed dataset raises when it reaches the
            line.
    """
    rows = RowsOf(files)
    if streaming:
        return IterableDataset.from_generator(_stream, gen_kwargs={"files": tuple(str(f) for f in files)})
    if sum(file.stat().st_size for file in files) <= _LARGE:
        return exact_dataset(list(rows))
    return _through_cache(rows, files)


def exact_dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    """A dataset in memory that returns every value unchanged. `Dataset.from_list` may change types and add keys."""
    kinds = _kinds(rows)
    tables = [_table(chunk, kinds) for chunk in _chunks(rows)]
    table = pa.concat_tables(tables) if tables else _table([], kinds)
    info = DatasetInfo(features=_features(kinds))
    return Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint=uuid.uuid4().hex)


def new_fingerprint(rows: Dataset) -> str | None:
    """The fingerprint for a dataset that is made from `rows`: a random one if `rows` is in memory, else None.

    With None the library computes a hash, by which it finds earlier results on disk. The hash includes the tokenizer
    and takes a tenth of a second or more. For rows in memory it is not needed, because nothing is kept on disk.
    """
    return None if rows.cache_files else uuid.uuid4().hex


def _stream(files: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    yield from RowsOf([Path(f) for f in files])


class RowsOf:
    """The rows of files as dictionaries. They can be iterated over many times. Errors are those of `read_files`."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            read = _csv_rows if file.suffix.lower() == ".csv" else _json_rows
            for number, row in enumerate(read(file)):
                if len(self.files) > 1:
                    row = {**row, ROW_COLUMN: number, FILE_COLUMN: file.name}
                yield row


def _through_cache(rows: RowsOf, files: Sequence[Path]) -> Dataset:
    """The rows as a dataset on disk. It is written again only if the files have changed."""
    stamps = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((_VERSION, stamps)).encode()).hexdigest()[:24]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "renyi" / f"{key}.arrow"
    if not cached.is_file():
        kinds = _kinds(rows)
        schema = _features(kinds).arrow_schema
        with opened_whole(cached) as sink, pa.ipc.new_stream(sink, schema) as writer:
            for chunk in _chunks(rows):
                writer.write_table(_table(chunk, kinds).cast(schema))
    return Dataset.from_file(str(cached))


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


# ---- Types -----------------------------------------------------------------------------------------------------------

_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "string"}
_JSON = "json"  # the kind of a column with values of several types: each value is kept as JSON


def _kind(value: Any) -> str | None:
    """The Arrow type of a value: "string", "list of int64", …; "list" for an empty list, `_JSON` for all else."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return _JSON
    if type(value) in _SCALARS:
        return _SCALARS[type(value)]
    if isinstance(value, list):
        kinds = {_kind(item) for item in value}
        if not kinds:
            return "list"
        if len(kinds) == 1 and kinds <= set(_SCALARS.values()):
            return f"list of {kinds.pop()}"
    return _JSON


def _kinds(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The kind of every column, in the order in which the columns first occur."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for column, value in row.items():
            kinds = found.setdefault(column, set())
            kind = _kind(value)
            if kind:
                kinds.add(kind)
    return {column: _common(kinds) for column, kinds in found.items()}


def _common(kinds: set[str]) -> str:
    if not kinds:
        return "string"
    if len(kinds) == 2 and "list" in kinds:
        (other,) = kinds - {"list"}
        return other if other.startswith("list") else _JSON
    kind = kinds.pop() if len(kinds) == 1 else _JSON
    return _JSON if kind == "list" else kind


def _features(kinds: dict[str, str]) -> Features:
    def feature(kind: str) -> Any:
        if kind == _JSON:
            return Json()
        return List(Value(kind[8:])) if kind.startswith("list of ") else Value(kind)

    return Features({column: feature(kind) for column, kind in kinds.items()})


def _table(rows: list[dict[str, Any]], kinds: dict[str, str]) -> pa.Table:
    schema = _features(kinds).arrow_schema
    arrays = [_array(rows, column, kinds[column], schema.field(column).type) for column in kinds]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(rows: list[dict[str, Any]], column: str, kind: str, to: pa.DataType) -> pa.Array:
    values = [row.get(column) for row in rows]
    if kind != _JSON:
        return pa.array(values, to)
    texts = [None if value is None else _as_json(value, column) for value in values]
    return pa.ExtensionArray.from_storage(to, pa.array(texts, to.storage_type))


def _as_json(value: Any, column: str) -> str:
    """The value as JSON text that `Json` reads back unchanged."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        same = ujson_loads(text) == value
    except ValueError:
        same = False
    if not same:
        raise DataError(
            f"holds a number of too many digits: {text[:80]}",
            where=f"column {column}",
            hint="Write it as text, in quotation marks.",
        )
    return text


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read one object per line, or a file that is one list of objects. Only a line feed ends a line."""
    with file.open("rb") as opened:
        for number, raw in enumerate(opened, start=1):
            where = f"{file}, line {number}"
            line = _decoded(raw, file).strip(" \t\r\n\ufeff")
            if not line:
                continue
            if line.startswith("["):
                yield from _whole(file)
                return
            try:
                value = _parsed(line)
            except ValueError as error:
                if file.suffix.lower() == ".json":
                    yield from _whole(file)
                    return
                raise _no_json(error, where) from error
            yield _object(value, where)


def _whole(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that is one JSON value: a list of objects, or one object."""
    try:
        value = _parsed(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _encoding(file) from error
    except ValueError as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _no_json(error, f"{file}{line}") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _object(row, f"{file}, row {number}")


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text, strict=False)  # with strict=True a raw tab within text would be an error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\ud" in text.lower() and (half := _half_character(value)) is not None:
        raise ValueError(f"it holds half a character: {half!r}")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"is {_short(value)}, and not an object", where=where, hint='Write {"text": "…"}, or the like.')
    return value


def _half_character(value: Any) -> str | None:
    """Find a text in a value that holds one half of a surrogate pair alone, which no encoding can write."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value[:40]
        return None
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((half for half in map(_half_character, inside) if half is not None), None)


def _no_json(error: ValueError, where: str) -> DataError:
    return DataError(
        f"could not be loaded: it is not JSON ({error})",
        where=where,
        hint="A jsonl file has one whole JSON object per line. A json file has one list of objects.",
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


# ---- csv -------------------------------------------------------------------------------------------------------------


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read every cell as text, and an empty cell as None."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, strict=True)
        try:
            header = next(reader, [])
            names = [name or f"column {i}" for i, name in enumerate(header, start=1)]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise DataError(f"has two columns {min(twice)!r}", where=f"{file}, line 1", hint="Rename one.")
            for cells in reader:
                if len(cells) > len(names):
                    raise DataError(
                        f"has {len(cells)} cells, and the header has {len(names)}",
                        where=f"{file}, line {reader.line_num}",
                        hint="Put a cell that holds a comma in quotation marks.",
                    )
                if cells:
                    padded = [*cells, *[""] * (len(names) - len(cells))]
                    yield {name: cell or None for name, cell in zip(names, padded, strict=True)}
        except csv.Error as error:
            raise DataError(
                f"could not be loaded: it is not csv ({error})",
                where=f"{file}, line {reader.line_num}",
                hint='Put a cell with a comma, a quotation mark or a line break in "…", and write a mark in it as "".',
            ) from error
        except UnicodeDecodeError as error:
            raise _encoding(file) from error


# ---- Encodings -------------------------------------------------------------------------------------------------------


def _decoded(raw: bytes, file: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _encoding(file) from error


def _encoding(file: Path) -> DataError:
    """The error for a file that is not UTF-8. It names the first wrong byte and a likely encoding."""
    with file.open("rb") as opened:
        start = opened.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            hint = "Write the file in UTF-8: iconv -f utf-16 -t utf-8."
            return DataError("is UTF-16, not UTF-8", where=f"{file}, line 1", hint=hint)
        opened.seek(0)
        for number, raw in enumerate(opened, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(
                    f"is not UTF-8: byte 0x{raw[error.start]:02x} at place {error.start + 1} of the line",
                    where=f"{file}, line {number}",
                    hint="It may be latin-1 or Windows-1252; write it in UTF-8: iconv -f latin1 -t utf-8.",
                )
    return DataError("is not UTF-8", where=str(file), hint="Write the file in UTF-8.")
