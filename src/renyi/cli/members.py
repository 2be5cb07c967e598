"""How a table about members looks on a terminal. Training and `renyi score` end with one."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.console import headed

if TYPE_CHECKING:
    from renyi.inference import MemberTable


def shown_table(members: "MemberTable") -> RenderableType:
    """The table, with its title above and its legend and what members wrote below."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    is_text = [column in members.texts for column in members.columns]
    for column, text in zip(members.columns, is_text, strict=True):
        if text:
            table.add_column(column, style="italic" if column else "")  # only such a column may become narrower
        else:
            table.add_column(column, justify="right", no_wrap=True, min_width=max(len(column), 6))
    for row in members.rows:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    parts: list[RenderableType] = [headed(members.title), Text(members.about, "dim"), table]
    parts += [Text(members.legend, "dim")] if members.legend else []
    for prompt, answers in members.written:
        side_by_side = Table.grid(padding=(0, 2))
        side_by_side.add_column(style="dim", no_wrap=True)
        side_by_side.add_column()
        for name, answer in answers:
            side_by_side.add_row(f"  {name}", Text(answer))
        parts += [Text(f"\n{prompt}", "dim"), side_by_side]
    return Group(*parts)
