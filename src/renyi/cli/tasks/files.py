"""What DATA names where a task reads several files, and the baselines beside ENSEMBLE.

It knows folders and names of files, and no task.
"""

import argparse
import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from renyi.cli.reading import Loaded, load_ensemble, load_rows
from renyi.cli.tables import group_names
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


def load_files(args: argparse.Namespace, names: Sequence[str]) -> list[File]:
    """The rows of files, hub datasets, and of all data files in a folder; of `…_dev` and `…_test` one split only."""
    files = []
    for name in names:
        inside: Sequence[str | Path] = _inside(Path(name), args.split) if Path(name).is_dir() else []
        for one in inside or [name]:
            single = copy.copy(args)
            single.data = str(one)
            single.split = None if inside else args.split
            stem = Path(one).stem if Path(one).suffix.lower() in _ENDINGS else str(one)
            match = _SPLIT.fullmatch(stem)
            files.append(File(load_rows(single), str(one), match[1] if match else stem))
    return files


def _inside(folder: Path, split: str | None) -> list[Path]:
    """Data files directly in a folder; where names end in a split, those of `split`, by default test."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _ENDINGS)
    of_split = {f: match[2] for f in files if (match := _SPLIT.fullmatch(f.stem))}
    if not of_split:
        return files
    there = sorted(set(of_split.values()))
    wanted = split or ("test" if "test" in there else there[0])
    if wanted not in there:
        raise ConfigError(
            f"{folder} has no files of split {wanted!r}", where="--split", hint=f"There are {', '.join(there)}."
        )
    return [f for f, name in of_split.items() if name == wanted]


def file_groups(files: Sequence[File], column: str | None) -> tuple[str, list[str]] | None:
    """What groups are called, and the group of every row: a column's, or the subject where there are several files."""
    if column is None and len(files) == 1:
        return None
    if column is None or (column == SUBJECT and SUBJECT not in files[0].rows.column_names):
        return SUBJECT, [file.subject for file in files for _ in range(len(file.rows))]
    return column, [group for file in files for group in group_names(file.rows, column)]


def baseline_name(folder: str, taken: Iterable[str]) -> str:
    """A baseline's name in tables: its folder's, or all of it where that is taken."""
    name = Path(folder).resolve().name if Path(folder).is_dir() else folder
    return name if name not in {"mixture", *taken} else folder


def load_baseline(args: argparse.Namespace, folder: str) -> Loaded:
    """The ensemble, or single adapter's ensemble, that `--baseline` names, on the same base and device."""
    single = copy.copy(args)
    single.ensemble = folder
    return load_ensemble(single)
