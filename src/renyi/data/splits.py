"""Loads the splits of a dataset: from local files, from a folder (also one that `save_to_disk` wrote), or from the hub.

Every error says what was looked for and where. Read next: `rows.py`, which says what a row means.
"""

import glob
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from renyi.data.files import FORMATS, read_files
from renyi.errors import ConfigError, DataError, first_line

_HUB_OR_FILE = "Give a json, jsonl, csv or parquet file, or the id of a hub dataset."


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Load a local json, jsonl, csv or parquet file (as split "train"), a folder of such files, or a hub dataset.

    Values of local json and csv files stay as they are written, see `files.py`. A folder may also be one that
    `save_to_disk` wrote.

    Args:
        name: path of a file or folder, or id of a hub dataset.
        config: name of the configuration of a hub dataset.
        streaming: whether to read rows only when they are needed.

    Returns:
        A dictionary of datasets by split.

    Raises:
        DataError: the file is missing, empty or cannot be read; the message names the line.
    """
    path = Path(name)
    kind = FORMATS.get(path.suffix.lower())
    if path.is_dir():
        kind = None
    if kind is None and (path.is_file() or (not path.exists() and name.count("/") > 1)):
        kind_of_file = f"is a {path.suffix} file" if path.suffix else "is a file without an extension"
        what = kind_of_file if path.is_file() else "there is no such file or folder"
        raise DataError(what, where=name, hint=_HUB_OR_FILE)
    if kind and not path.is_file():
        raise DataError("there is no such file", where=name, hint=f"Looked in {path.absolute().parent}.")
    if kind and path.stat().st_size == 0:
        raise _empty(name)
    try:
        if kind == "parquet":  # the library reads a name as a pattern, so brackets must be escaped
            return load_dataset(kind, data_files={"train": glob.escape(str(path))}, streaming=streaming)
        if kind:
            return _splits({"train": read_files([path], streaming)})
        if path.is_dir():
            return _folder(path, config, streaming)
        return load_dataset(name, config, streaming=streaming)
    except DataError:
        raise
    except (DatasetGenerationError, DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise _empty(name) from error
        raise DataError(
            f"could not be loaded ({first_line(error.__cause__ or error)})",
            where=name,
            hint="Give a json, jsonl, csv or parquet file with one example per row, or the id of a hub dataset.",
        ) from error


def _folder(path: Path, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """The splits of a local folder that `save_to_disk` wrote, or of a folder of files."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        return _splits({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    builder = load_dataset_builder(str(path), config)
    files = builder.config.data_files or {}
    local = {str(split): [Path(file) for file in named] for split, named in files.items()}
    if all(FORMATS.get(f.suffix.lower()) in ("json", "csv") and f.is_file() for fs in local.values() for f in fs):
        return _splits({split: read_files(named, streaming) for split, named in local.items()})
    return load_dataset(str(path), config, streaming=streaming)


def _splits(rows: Any) -> DatasetDict | IterableDatasetDict:
    is_whole = all(isinstance(split, Dataset) for split in rows.values())
    return DatasetDict(rows) if is_whole else IterableDatasetDict(rows)


def choose_split(splits: Any, split: str, name: str, key: str) -> Dataset | IterableDataset:
    """One split of a loaded dataset.

    Args:
        splits: the result of `load_splits`.
        split: the name of the split.
        name: the name of the dataset, for the message.
        key: the setting that chose the split, for the message.

    Raises:
        ConfigError: there is no such split.
        DataError: the split has no rows.
    """
    if split not in splits:
        raise ConfigError(
            f"{name} has no split {split!r}", where=key, hint=f"Its splits are {', '.join(map(repr, splits))}."
        )
    rows: Dataset | IterableDataset = splits[split]
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise _empty(name)
    return rows


def _empty(name: str) -> DataError:
    return DataError("the dataset is empty", where=name, hint="A dataset needs at least one row.")
