"""The column of `routing_group`: which rows belong together, such as those of one annotator or one document.

Prepared rows keep it as text in the column `GROUP_COLUMN`. Read next: `renyi.routing.groups`, which shares one
responsibility over the rows of a group.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset

from renyi.data.rows import FILE_COLUMN, ROW_COLUMN, Form, columns_of, numbered_rows
from renyi.errors import ConfigError, DataError

GROUP_COLUMN = "routing_group"  # in prepared rows


def with_group(form: Form, rows: Any, column: str | None) -> Form:
    """A form that also keeps the column of the groups, if the rows have it."""
    if column is None or column in form.kept or column not in columns_of(rows):
        return form
    left_out = tuple(c for c in form.left_out if c != column)
    return replace(form, kept=(*form.kept, column), left_out=left_out)


def check_has_group(rows: Any, column: str, where: str) -> None:
    """Raise `ConfigError` unless the rows, streamed or not, have the column."""
    there = [c for c in columns_of(rows) if c not in (ROW_COLUMN, FILE_COLUMN)]
    if column not in there:
        raise ConfigError(
            f"{where} has no column {column!r}",
            where="routing_group",
            hint=f"The columns are {', '.join(sorted(there))}.",
        )


def check_groups(rows: Dataset, column: str, where: str) -> None:
    """Raise an error unless every row has a group. The message names the first row that has none."""
    check_has_group(rows, column, where)
    for row, at in numbered_rows(rows, (column,), where):
        group_of(row, column, at)


def group_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The group of a row as text: its value in `column`, which is text, a whole number, or true or false.

    Raises:
        DataError: there is no such value.
    """
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is read as one of fractions
    if not isinstance(value, str | int) or value == "":
        raise DataError(
            "is empty" if value in (None, "") else f"is {value!r}",
            where=f"{where}, column {column}",
            hint="Every row needs the name or number of its group (routing_group).",
        )
    return str(value)
