"""A report as data: tables, charts, examples and notes. A terminal and a page of HTML both show it.

Tasks build a `Report` from what they found. `page` writes it as HTML, `renyi.cli.evaluate` prints it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from renyi.evaluation.estimate import Estimate

Cell = str | float | None | Estimate  # None and NaN are shown as a dash
BEST = "bold: best of its column"
UNDEFINED = "–"


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        name: its heading.
        form: how its numbers are written, as for `format`.
        best: whether the highest or the lowest figure is the best, which is then shown bold; None if neither.
    """

    name: str
    form: str = ""
    best: Literal["high", "low"] | None = None


class Table(NamedTuple):
    """Names in the first column, figures in the others.

    Attributes:
        title: above it; may be empty.
        columns: a heading for each; a plain text is a column without numbers.
        rows: cells, as many as columns.
        note: a line below it.
        sizes: the size of each row's group. If there are very many rows, a terminal shows those of the largest.
        narrow: how many columns a terminal shows; by default all.
        has_intervals: whether estimates are shown with their intervals.
    """

    title: str
    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    sizes: Sequence[float] | None = None
    narrow: int | None = None
    has_intervals: bool = True


class Chart(NamedTuple):
    """A figure that is drawn when a page is written; `name` is its PNG's without ending, `note` a line below it."""

    title: str
    name: str
    draw: Callable[[], bytes]
    note: str = ""


class Example(NamedTuple):
    """One example: its row, a text, and views of it as a table.

    Attributes:
        title: which one it is.
        aside: a remark in the same line.
        text: of the example; may be empty.
        columns: headings; empty for a table without.
        rows: of the table.
        marks: rows that stand out, as good or bad.
    """

    title: str
    aside: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Mapping[int, Literal["good", "bad"]] = {}


class Examples(NamedTuple):
    """Examples under one title, the most telling first."""

    title: str
    note: str
    examples: Sequence[Example]


class Note(NamedTuple):
    """A titled sentence."""

    title: str
    text: str


class Lines(NamedTuple):
    """A titled text that keeps its line breaks and its columns of characters."""

    title: str
    text: str


Section = Table | Chart | Examples | Note | Lines


def _nothing_more() -> list[Section]:
    return []


class Report(NamedTuple):
    """What one evaluation has to show.

    Attributes:
        title, subtitle: of the whole.
        sections: what a terminal prints (all but charts) and a page holds.
        page_only: makes further sections, for the page alone.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    page_only: Callable[[], Sequence[Section]] = _nothing_more


# ---- Cells -----------------------------------------------------------------------------------------------------------


def cell_text(cell: Cell, column: Column | str, has_intervals: bool = True, brackets: bool = False) -> str:
    """A cell as text: an estimate as `0.40 ±0.05`, or with brackets as `0.40 [0.35, 0.45]`.

    An interval of width zero is shown as a dash: examples that are all equal do not show how others would vary.
    """
    if isinstance(cell, str):
        return cell
    form = column.form if isinstance(column, Column) else ""
    value, low, high = cell if isinstance(cell, Estimate) else (cell, None, None)
    if value is None or value != value:
        return UNDEFINED
    text = format(value, form)
    if not has_intervals or low is None or high is None:
        return text
    is_known = high > low  # false of NaN
    if brackets:
        return f"{text} [{format(low, form)}, {format(high, form)}]" if is_known else f"{text} [{UNDEFINED}]"
    return f"{text} ±{format((high - low) / 2, form) if is_known else UNDEFINED}"


def best_cells(table: Table) -> set[tuple[int, int]]:
    """Row and column of every cell that is the best of its column. Ties all count; if all are equal, none is best."""
    found: set[tuple[int, int]] = set()
    for c, column in enumerate(table.columns):
        if not isinstance(column, Column) or column.best is None:
            continue
        figures = {r: _figure(row[c]) for r, row in enumerate(table.rows)}
        known = {r: value for r, value in figures.items() if value is not None and value == value}
        if len(set(known.values())) > 1:
            best = (max if column.best == "high" else min)(known.values())
            found |= {(r, c) for r, value in known.items() if value == best}
    return found


def _figure(cell: Cell) -> float | None:
    return None if isinstance(cell, str) else cell.value if isinstance(cell, Estimate) else cell


def note_of(table: Table) -> str:
    """The line below a table. It says what bold means if anything is bold."""
    return " · ".join(part for part in (table.note, BEST if best_cells(table) else "") if part)


def shortened(text: str, length: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def one_line(text: str, length: int = 180) -> str:
    """The beginning of a text without its breaks of lines."""
    return shortened(" ".join(text.split()), length)
