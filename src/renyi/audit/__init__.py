"""Find where a fine-tuning dataset contradicts itself.

`audit` reads rows and says which contradict which, row by row and group by group. `write_audit` leaves the result in a
folder: one line for each row, one for each group, a short page of text and a page to browse. Read next: `reading.py`.
"""

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from renyi.audit.findings import CONTESTED, KINDS, SETS, Audit, Group, RowVerdict, Side, verdicts_of
from renyi.audit.next_step import next_command
from renyi.audit.pages import said_by_model, write_audit
from renyi.audit.reading import Rows, find_conflicts
from renyi.errors import ConfigError, DataError

__all__ = [
    "CONTESTED",
    "KINDS",
    "SETS",
    "Audit",
    "Group",
    "RowVerdict",
    "Side",
    "audit",
    "cleaned",
    "marked",
    "next_command",
    "read_rows",
    "said_by_model",
    "write_audit",
]


def audit(
    rows: Sequence[Mapping[str, Any]],
    *,
    near: float = 0.85,
    text_field: str = "text",
    places: Sequence[tuple[str, int]] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Audit:
    """Find where rows of training data contradict each other, without a model.

    Args:
        rows: N rows in any form that `renyi sft` and `renyi dpo` read, or Alpaca records; a list or a `Dataset`.
        near: in (0, 1]. Two prompts ask nearly the same if the Jaccard similarity of their words, without stop words,
            is at least this. Prompts that differ in a number, a negation or a name never ask the same.
        text_field: the column of a row of text.
        places: file and number of every row, counted from 1; by default one nameless file.
        progress: called from time to time with the number of rows read.

    Raises:
        ConfigError: `near` is out of range.
        DataError: there are no rows, or one has no known form.
    """
    if not 0 < near <= 1:
        raise ConfigError(f"is {near:g}", where="near", hint="Give a similarity above 0 and at most 1.")
    if len(rows) == 0:
        raise DataError("there are no rows", where="rows", hint="Give at least one.")
    places = places if places is not None else [("", number + 1) for number in range(len(rows))]
    groups, statements = find_conflicts(rows, near, text_field, progress)
    groups.sort(key=lambda g: (g.score, -len(g.rows), g.rows[:1]))
    for group in groups:
        group.where = [[_place(*places[row]) for row in side.rows] for side in group.sides]
    return Audit(verdicts_of(groups, places), groups, statements, {"near": near, "contested_below": CONTESTED})


def read_rows(names: Sequence[str], split: str | None = None) -> tuple[Rows, list[tuple[str, int]]]:
    """The rows of one or several datasets, one dataset after another, and the file and number of each row.

    Args:
        names: json, jsonl, csv or parquet files, or hub ids.
        split: to read; by default "train", or the only one.

    Raises:
        DataError: a file cannot be read, or is empty.
        ConfigError: there is no such split.
    """
    from renyi import data

    parts: list[Any] = []
    places: list[tuple[str, int]] = []
    for name in names:
        splits = data.load_splits(name)
        chosen = split or ("train" if "train" in splits else next(iter(splits)))
        rows = data.choose_split(splits, chosen, name, "--split")
        parts.append(rows)
        file = Path(name).name if len({Path(n).name for n in names}) == len(names) else name
        places += [(file, number) for number in range(1, len(rows) + 1)]
    return parts[0] if len(parts) == 1 else _Joined(parts), places


class _Joined(Sequence[Mapping[str, Any]]):
    """Several datasets, one after another. They are not merged, because their columns may differ."""

    def __init__(self, parts: Sequence[Any]):
        self._parts, self._starts = parts, list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]

    def __iter__(self) -> Iterator[Any]:
        return chain(*self._parts)


def _place(file: str, row: int) -> str:
    return f"{file}:{row}" if file else f"row {row}"


def cleaned(result: Audit, drop: Iterable[str]) -> list[int]:
    """The rows, counted from 0, that stay when some kinds of finding are dropped.

    The first row of duplicates stays. No row of any other dropped kind stays.

    Args:
        result: of an audit.
        drop: kinds of `KINDS`, or names of `SETS`.
    """
    kinds = {kind for name in drop for kind in SETS.get(name, (name,))}
    gone: set[int] = set()
    for group in result.groups:
        if group.kind in kinds:
            gone |= set(group.rows[1:] if group.kind == "duplicate" else group.rows)
    return [v.index for v in result.verdicts if v.index not in gone]


def marked(rows: Rows, result: Audit, kept: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Rows with two more columns: `group`, the number of the row's group, and `side`, its side there; both may be None.

    Args:
        rows: that were audited.
        result: of the audit.
        kept: numbers of the rows to give, counted from 0.

    Raises:
        DataError: a row has such a column already.
    """
    for index in kept:
        row, verdict = rows[index], result.verdicts[index]
        if taken := {"group", "side"} & row.keys():
            raise DataError(
                f"has a column {sorted(taken)[0]!r} already",
                where=_place(verdict.file, verdict.row),
                hint="Rename it, or write the rows without their sides.",
            )
        yield {**row, "group": verdict.group, "side": verdict.side}
