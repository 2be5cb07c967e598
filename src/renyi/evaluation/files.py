"""Rows from files and hub datasets, their groups, and their columns, for tasks that read them.

A `File` is some rows with the name that errors use. A folder means all data files in it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

SUBJECT = "subject"  # the group that a row's file is
_ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
_SPLIT = re.compile(r"(.+)_(train|dev|val|validation|test)")


class File(NamedTuple):
    """The rows of one file or hub dataset, what it is called, and its subject: its name without ending and split."""

    rows: "Dataset"
    name: str
    subject: str


class Groups(NamedTuple):
    """What groups of rows are called, and the group of every row."""

    name: str
    of_rows: list[str]


def as_files(rows: Any) -> list[File]:
    """Rows in any form as files: a `Dataset`, a list of dicts, a path or hub id, `File`s, or a list of paths."""
    from datasets import Dataset

    if isinstance(rows, str | Path):
        return load_files([str(rows)])
    if isinstance(rows, Dataset):
        return [File(rows, "dataset", "dataset")]
    if isinstance(rows, File):
        return [rows]
    given = list(rows)
    if given and all(isinstance(row, File) for row in given):
        return given
    if given and all(isinstance(row, str | Path) for row in given):
        return load_files([str(row) for row in given])
    if not given or not all(isinstance(row, Mapping) for row in given):
        raise ConfigError(
            "are no rows", where="rows", hint="Give a Dataset, a list of dicts with at least one row, or paths."
        )
    return [File(Dataset.from_list([dict(row) for row in given]), "rows", "rows")]


def load_files(names: Sequence[str], split: str | None = None, config: str | None = None) -> list[File]:
    """The rows of files, hub datasets, and data files in a folder. If names end in `_dev`, `_test`: of one split."""
    files = []
    for name in names:
        inside: Sequence[str | Path] = _inside(Path(name), split) if Path(name).is_dir() else []
        for one in inside or [name]:
            stem = Path(one).stem if Path(one).suffix.lower() in _ENDINGS else str(one)
            match = _SPLIT.fullmatch(stem)
            rows = load_rows(str(one), None if inside else split, config)
            files.append(File(rows, str(one), match[1] if match else stem))
    return files


def load_rows(name: str, split: str | None = None, config: str | None = None) -> "Dataset":
    """The rows of a file or hub dataset, from its split `split`; by default `test` if it exists, else the first."""
    from renyi.data import read_rows

    return read_rows(name, split, config)


def _inside(folder: Path, split: str | None) -> list[Path]:
    """Data files directly in a folder. If names end in a split: those of `split`, by default test."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _ENDINGS)
    of_split = {f: match[2] for f in files if (match := _SPLIT.fullmatch(f.stem))}
    if not of_split:
        return files
    there = sorted(set(of_split.values()))
    wanted = split or ("test" if "test" in there else there[0])
    if wanted not in there:
        raise ConfigError(
            f"{folder} has no files of split {wanted!r}", where="split", hint=f"There are {', '.join(there)}."
        )
    return [f for f, name in of_split.items() if name == wanted]


# ---- Columns ---------------------------------------------------------------------------------------------------------


def column_values(rows: "Dataset", name: str, setting: str) -> list[Any]:
    """The values of a column that a setting names.

    Raises:
        ConfigError: there is no such column.
    """
    if name not in rows.column_names:
        near = difflib.get_close_matches(name, rows.column_names, n=1)
        raise ConfigError(
            f"there is no column {name!r}",
            where=setting,
            hint=f"Did you mean {near[0]}?" if near else f"The columns are {', '.join(rows.column_names)}.",
        )
    return list(rows[name])


def group_names(rows: "Dataset", name: str) -> list[str]:
    """A column's values as names of groups."""
    values = column_values(rows, name, "group")
    for number, value in enumerate(values, start=1):
        if isinstance(value, list | dict):
            raise ConfigError(
                f"column {name} holds {'a list' if isinstance(value, list) else 'an object'} in row {number}",
                where="group",
                hint="Give a column of text, numbers, or true and false.",
            )
    return ["null" if value is None else str(value) for value in values]


def file_groups(files: Sequence[File], column: str | None) -> Groups | None:
    """The groups of all rows: from a column, or the subject if there are several files. Else None."""
    if column is None and len(files) == 1:
        return None
    if column is None or (column == SUBJECT and SUBJECT not in files[0].rows.column_names):
        return Groups(SUBJECT, [file.subject for file in files for _ in range(len(file.rows))])
    return Groups(column, [group for file in files for group in group_names(file.rows, column)])
