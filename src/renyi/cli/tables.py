"""What the tasks of `renyi evaluate` share: columns of the dataset, tables, and results as JSON.

It knows no task.
"""

import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from renyi.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

WIDEST_TABLE = 20  # groups, beyond which only the largest are shown
LONGEST_TEXT = 180  # characters shown of a prompt or a completion


def column_values(rows: "Dataset", name: str, flag: str) -> list[Any]:
    """The values of a column that the flag names.

    Raises:
        ConfigError: there is no such column.
    """
    if name not in rows.column_names:
        near = difflib.get_close_matches(name, rows.column_names, n=1)
        raise ConfigError(
            f"there is no column {name!r}",
            where=flag,
            hint=f"Did you mean {near[0]}?" if near else f"The columns are {', '.join(rows.column_names)}.",
        )
    return list(rows[name])


def group_names(rows: "Dataset", name: str) -> list[str]:
    """A column's values as names of groups."""
    values = column_values(rows, name, "--group")
    for number, value in enumerate(values, start=1):
        if isinstance(value, list | dict):
            raise ConfigError(
                f"column {name} holds {'a list' if isinstance(value, list) else 'an object'} in row {number}",
                where="--group",
                hint="Give a column of text, numbers, or true and false.",
            )
    return ["null" if value is None else str(value) for value in values]


def as_json(value: Any) -> Any:
    """Named tuples, however deep, as JSON objects, and what is no number as null."""
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [as_json(item) for item in value] if isinstance(value, list) else value


def titled(text: str) -> Text:
    return Text.assemble("\n", (text, "bold"))


def figures_table(columns: Sequence[str]) -> Table:
    """The first column holds names, the others figures."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left", no_wrap=True, min_width=6)
    return table


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
