"""How a report's sections, and tables of figures, look on a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from renyi.evaluation import sections
from renyi.evaluation.sections import (
    Chart,
    Example,
    Examples,
    Lines,
    Note,
    Section,
    best_cells,
    cell_text,
    note_of,
    shortened,
)
from renyi.evaluation.task import as_json
from renyi.text import printable

__all__ = ["LONGEST_TEXT", "WIDEST_TABLE", "as_json", "figures_table", "rendered", "shortened", "titled"]

WIDEST_TABLE = 20  # if a table has more rows, only the largest are shown
LONGEST_TEXT = 180  # characters shown of a prompt or a completion
LONGEST_CELL = 48
STYLES = {"good": "green", "bad": "red"}


def rendered(section: Section, show: int) -> RenderableType | None:
    """A section, with the first `show` of its examples; None for what a terminal does not show."""
    match section:
        case sections.Table():
            return _table(section)
        case Examples(title, note, examples):
            parts = [part for example in examples[:show] for part in _example(example)]
            return Group(titled(title), Text(note, "dim"), *parts) if parts else None
        case Note(title, text):
            return Group(titled(title), Text(printable(text)))
        case Lines(title, text):
            return Group(titled(title), Text(printable(text)))
        case Chart():
            return None


def _table(section: sections.Table) -> RenderableType:
    best = best_cells(section)
    table = figures_table([_name(c) for c in section.columns[: section.narrow]])
    rows = list(range(len(section.rows)))
    if section.sizes is not None and len(rows) > WIDEST_TABLE:
        rows = sorted(rows, key=lambda r: -section.sizes[r])[:WIDEST_TABLE]  # type: ignore[index]
    for r in rows:
        cells = [
            Text(
                shortened(_line(cell_text(cell, column, section.has_intervals)), LONGEST_CELL),
                "bold" if (r, c) in best else "",
            )
            for c, (cell, column) in enumerate(zip(section.rows[r], section.columns, strict=True))
        ]
        table.add_row(*cells[: section.narrow])
    parts: list[RenderableType] = [titled(section.title) if section.title else Text(), table]
    parts += [Text(printable(note_of(section)), "dim")] if note_of(section) else []
    if len(rows) < len(section.rows):
        parts.append(Text(f"and {len(section.rows) - len(rows)} smaller ones; all with --json", "dim"))
    return Group(*parts)


def _example(example: Example) -> list[RenderableType]:
    head = Text.assemble((f"\n{_line(example.title)}", "bold"), (f"   {_line(example.aside)}", "dim"))
    text = [Text(shortened(_line(" ".join(example.text.split())), LONGEST_TEXT))] if example.text else []
    styles = [STYLES.get(example.marks.get(i, ""), "") for i in range(len(example.rows))]
    if example.columns:
        table = figures_table(example.columns)
        for row, style in zip(example.rows, styles, strict=True):
            table.add_row(Text(shortened(_line(row[0]), LONGEST_CELL), style), *(Text(_line(cell)) for cell in row[1:]))
        return [head, *text, table]
    grid = Table.grid(padding=(0, 2))
    for c in range(len(example.rows[0])):
        last = c == len(example.rows[0]) - 1
        grid.add_column(style="" if c else "dim", no_wrap=not last)
    for row, style in zip(example.rows, styles, strict=True):
        grid.add_row(Text(_line(row[0])), *(Text(_line(cell), style) for cell in row[1:]))
    return [head, *text, Padding(grid, (0, 0, 0, 2), expand=False)]


def _name(column: sections.Column | str) -> str:
    return column if isinstance(column, str) else column.name


def _line(text: str) -> str:
    return printable(text, keep="")


def titled(text: str) -> Text:
    return Text.assemble("\n", (_line(text), "bold"))


def figures_table(columns: Sequence[str]) -> Table:
    """The first column holds names, the others figures."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(Text(_line(column)), justify="right" if i else "left", no_wrap=True, min_width=6)
    return table
