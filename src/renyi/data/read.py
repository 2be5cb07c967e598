"""Makes a dataset from rows that a caller gives as a file, a hub dataset, a list of dictionaries, or a dataset.

Read next: `splits.py`, which loads files and hub datasets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset

from renyi.data.files import exact_dataset
from renyi.data.splits import choose_split, load_splits
from renyi.errors import ConfigError, DataError


def read_rows(rows: Any, split: str | None = None, config: str | None = None) -> Dataset:
    """Return rows as a dataset.

    Args:
        rows: the path of a json, jsonl, csv or parquet file, the id of a hub dataset, a list of dictionaries, a
            dataset, or a dictionary of splits.
        split: the split to read if there are several; by default "test" if there is one, else the first.
        config: the configuration of a hub dataset.

    Raises:
        DataError: the rows cannot be loaded, or there are none.
        ConfigError: there is no such split, or the rows are streamed.
    """
    name = str(rows) if isinstance(rows, str | Path) else "rows"
    if isinstance(rows, str | Path):
        rows = load_splits(name, config)
    elif isinstance(rows, Sequence) and all(isinstance(row, dict) for row in rows):
        rows = exact_dataset(rows)
    if isinstance(rows, DatasetDict):
        rows = choose_split(rows, split or ("test" if "test" in rows else next(iter(rows))), name, "split")
    if isinstance(rows, IterableDataset):
        raise ConfigError("are streamed", where=name, hint="Load the dataset whole.")
    if not isinstance(rows, Dataset):
        kind = type(rows).__name__
        raise DataError(f"is a {kind}", where=name, hint="Give a path, a hub id, a list of dictionaries, or a dataset.")
    if len(rows) == 0:
        raise DataError("the dataset is empty", where=name, hint="A dataset needs at least one row.")
    return rows
