"""A report on disk: evaluation.json, charts as PNG files, and one page of HTML that holds everything.

Read next: `sections.py`, what a report consists of. Tasks build it.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from renyi.evaluation.sections import (
    Chart,
    Example,
    Examples,
    Lines,
    Note,
    Report,
    Section,
    Table,
    best_cells,
    cell_text,
    note_of,
)
from renyi.evaluation.stored import SECTIONS_FILE, sections_json
from renyi.files import write_whole
from renyi.text import printable

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 62rem;
  margin: 2.5rem auto 5rem; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; } p { margin: .3rem 0 .6rem; } .dim { color: #66717e; font-size: .9rem; }
.wide { overflow-x: auto; max-width: 100%; } img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th { text-align: right; font-weight: 600; color: #66717e; border-bottom: 1px solid #cfd6dd; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid #eef1f4; white-space: nowrap; } th, td { padding: .25rem .8rem; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; white-space: normal; min-width: 6rem; }
table.text td { text-align: left; white-space: normal; vertical-align: top; }
table.text td:first-child { color: #66717e; min-width: 5rem; }
pre { font: .82rem/1.45 ui-monospace, monospace; margin: .4rem 0; }
td.best { font-weight: 700; } tr.good td { color: #23723a; } tr.bad td { color: #a83a2a; }
"""


def write_report(folder: Path, report: Report, result: Mapping[str, Any]) -> Path:
    """Write evaluation.json, a PNG for every chart, sections.json, then report.html, which needs none of the others.

    `sections.json` is what `renyi report` shows of an evaluation on its own page. If a chart cannot be drawn, the page
    says so, and everything else is written.

    Returns:
        The page's path.

    Raises:
        SaveError: something could not be written. Files that were written before stay.
    """
    page = folder / "report.html"
    write_whole(folder / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    sections = [*report.sections, *report.page_only()]
    drawn = [_drawn(section) if isinstance(section, Chart) else b"" for section in sections]
    for section, png in zip(sections, drawn, strict=True):
        if isinstance(section, Chart) and isinstance(png, bytes):
            write_whole(folder / f"{section.name}.png", png)
    kept = sections_json(report.title, report.subtitle, sections)
    write_whole(folder / SECTIONS_FILE, kept.encode("utf-8", "surrogatepass"))
    write_whole(folder / page.name, _html_of(report, sections, drawn))
    return page


def write_page(file: Path, report: Report) -> None:
    """Write one page of HTML that holds a report with its charts, and nothing else.

    Raises:
        SaveError: it could not be written.
    """
    sections = [*report.sections, *report.page_only()]
    drawn = [_drawn(section) if isinstance(section, Chart) else b"" for section in sections]
    write_whole(file.absolute(), _html_of(report, sections, drawn))


def _html_of(report: Report, sections: Sequence[Section], drawn: Sequence[bytes | str]) -> bytes:
    body = "\n".join(_html(section, png) for section, png in zip(sections, drawn, strict=True))
    return _page(report.title, report.subtitle, body).encode()


def _drawn(chart: Chart) -> bytes | str:
    """The chart's PNG, or the reason why it could not be drawn."""
    try:
        return chart.draw()
    except Exception as error:  # the evaluation must not be lost because drawing fails
        return f"This chart could not be drawn ({type(error).__name__}: {error})."


def _page(title: str, subtitle: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{_text(title)}</h1><p class="dim">{_text(subtitle)}</p>\n{body}\n</body></html>\n'
    )


def _text(text: str) -> str:
    """Every text on the page goes through this function. It escapes markup and characters that hide others."""
    return escape(printable(text))


def _html(section: Section, png: bytes | str) -> str:
    match section:
        case Table():
            return f"{_title(section.title)}{_figures(section)}{_dim(note_of(section))}"
        case Chart(title, _, _, note):
            if isinstance(png, str):
                return f"{_title(title)}{_dim(png)}"
            source = base64.b64encode(png).decode()
            return f'{_title(title)}<img alt="{_text(title)}" src="data:image/png;base64,{source}">{_dim(note)}'
        case Examples(title, note, examples):
            return f"{_title(title)}{_dim(note)}" + "\n".join(map(_example, examples))
        case Note(title, text):
            return f"{_title(title)}<p>{_text(text)}</p>"
        case Lines(title, text):
            return f'{_title(title)}<div class="wide"><pre>{_text(text)}</pre></div>'


def _title(text: str) -> str:
    return f"<h2>{_text(text)}</h2>\n" if text else ""


def _dim(text: str) -> str:
    return f'<p class="dim">{_text(text)}</p>' if text else ""


def _example(example: Example) -> str:
    text = f"<p>{_text(example.text)}</p>\n" if example.text else ""
    cells = [[_text(cell) for cell in row] for row in example.rows]
    classes = [example.marks.get(i, "") for i in range(len(cells))]
    named = f'<h3>{_text(example.title)} <span class="dim">{_text(example.aside)}</span></h3>\n'
    head = named if example.title or example.aside else ""
    return head + text + _table(example.columns, [[("", cell) for cell in row] for row in cells], classes)


def _figures(table: Table) -> str:
    best = best_cells(table)
    rows = [
        [
            ("best" if (r, c) in best else "", _text(cell_text(cell, column, table.has_intervals, brackets=True)))
            for c, (cell, column) in enumerate(zip(row, table.columns, strict=True))
        ]
        for r, row in enumerate(table.rows)
    ]
    return _table([c if isinstance(c, str) else c.name for c in table.columns], rows, [""] * len(rows))


def _table(columns: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], classes: Sequence[str]) -> str:
    """A table that scrolls sideways if it is wider than the page. A cell is given as its class and its text."""
    head = f"<tr>{''.join(f'<th>{_text(c)}</th>' for c in columns)}</tr>\n" if columns else ""
    lines = [
        f"<tr{_class(kind)}>{''.join(f'<td{_class(of_cell)}>{text}</td>' for of_cell, text in row)}</tr>"
        for row, kind in zip(rows, classes, strict=True)
    ]
    return f'<div class="wide"><table{_class("" if columns else "text")}>{head}' + "\n".join(lines) + "</table></div>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
