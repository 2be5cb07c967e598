"""The report of an evaluation: evaluation.json, figures as PNG files, and one page of HTML that holds everything.

Knows tables, figures and examples. It does not know tasks or how anything was found.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from renyi.errors import SaveError


class TableSection(NamedTuple):
    """A titled table, names in the first column and figures in the others, and a line below it; or the line alone."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class FigureSection(NamedTuple):
    """A titled figure: the PNG's file name without ending, its bytes, and a line below it."""

    title: str
    name: str
    png: bytes
    note: str = ""


class ExampleSection(NamedTuple):
    """One example: where it stands, its text, and every member's view of it as a table; `marked` rows stand out."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


Section = TableSection | FigureSection | ExampleSection

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 62rem;
  margin: 2.5rem auto 5rem; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; } p { margin: .3rem 0 .6rem; } .dim { color: #66717e; font-size: .9rem; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th { text-align: right; font-weight: 600; color: #66717e; border-bottom: 1px solid #cfd6dd; }
td { text-align: right; border-bottom: 1px solid #eef1f4; white-space: nowrap; } th, td { padding: .25rem .8rem; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; white-space: normal; max-width: 26rem; }
tr.first td { font-weight: 600; } tr.marked td { color: #23723a; font-weight: 600; }
"""


def write_report(
    folder: Path, title: str, subtitle: str, result: Mapping[str, Any], sections: Sequence[Section]
) -> None:
    """Write evaluation.json, a PNG for every figure, and report.html, which needs none of the others.

    Raises:
        SaveError: something could not be written. The folder is then as it was but for what was written already.
    """
    files = {"evaluation.json": (json.dumps(result, indent=1) + "\n").encode()}
    files |= {f"{s.name}.png": s.png for s in sections if isinstance(s, FigureSection)}
    files["report.html"] = _page(title, subtitle, sections).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
    except OSError as error:
        raise SaveError(f"could not be written ({error})", where=str(folder), hint="Free some space.") from error


def _page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    body = "\n".join(_html(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="dim">{escape(subtitle)}</p>\n{body}\n</body></html>\n'
    )


def _html(section: Section) -> str:
    match section:
        case TableSection(title, columns, rows, note):
            table = _table(columns, rows) if columns else ""
            return f"<h2>{escape(title)}</h2>\n{table}{_note(note)}"
        case FigureSection(title, _, png, note):
            source = base64.b64encode(png).decode()
            image = f'<img alt="{escape(title)}" src="data:image/png;base64,{source}">'
            return f"<h2>{escape(title)}</h2>\n{image}{_note(note)}"
        case ExampleSection(title, text, columns, rows, marked):
            return f"<h3>{escape(title)}</h3>\n<p>{escape(text)}</p>\n{_table(columns, rows, marked)}"


def _note(text: str) -> str:
    return f'<p class="dim">{escape(text)}</p>' if text else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], marked: frozenset[int] | None = None) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = []
    for i, row in enumerate(rows):
        style = ' class="first"' if marked is None and i == 0 else ' class="marked"' if marked and i in marked else ""
        lines.append(f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"
