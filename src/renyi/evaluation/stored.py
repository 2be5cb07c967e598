"""A report's sections as JSON, so that another page can show them: `sections.json` beside an evaluation's page.

Charts are kept by the name of their PNG file, which lies in the same folder. Read next: `page.py`, which writes both.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from renyi.errors import EnsembleFormatError
from renyi.evaluation.estimate import Estimate
from renyi.evaluation.sections import (
    Cell,
    Chart,
    Column,
    Example,
    Examples,
    Lines,
    Note,
    Report,
    Section,
    Table,
)

SECTIONS_FILE = "sections.json"


def sections_json(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Sections as JSON, with the title and the subtitle of their report. NaN becomes null."""
    kept = {"title": title, "subtitle": subtitle, "sections": [_kept(section) for section in sections]}
    return json.dumps(kept, allow_nan=False) + "\n"


def read_sections(folder: Path) -> Report:
    """The report of an evaluation that left `sections.json` in a folder.

    Raises:
        EnsembleFormatError: the file is damaged.
    """
    file = folder / SECTIONS_FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Report(kept["title"], kept["subtitle"], [_read(section, folder) for section in kept["sections"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnsembleFormatError(
            f"cannot be read ({error})", where=str(file), hint="Run the evaluation again, or remove the file."
        ) from error


def _kept(section: Section) -> dict[str, Any]:
    match section:
        case Table():
            return {
                "kind": "table",
                "title": section.title,
                "columns": [c if isinstance(c, str) else [c.name, c.form, c.best] for c in section.columns],
                "rows": [[_cell(cell) for cell in row] for row in section.rows],
                "note": section.note,
                "has_intervals": section.has_intervals,
            }
        case Chart():
            return {"kind": "chart", "title": section.title, "name": section.name, "note": section.note}
        case Examples(title, note, examples):
            shown = [{**e._asdict(), "marks": {str(i): mark for i, mark in e.marks.items()}} for e in examples]
            return {"kind": "examples", "title": title, "note": note, "examples": shown}
        case Note(title, text):
            return {"kind": "note", "title": title, "text": text}
        case Lines(title, text):
            return {"kind": "lines", "title": title, "text": text}


def _cell(cell: Cell) -> Any:
    if isinstance(cell, Estimate):
        return [_number(x) for x in cell]
    return cell if isinstance(cell, str) else _number(cell)


def _number(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None  # false of NaN


def _read(kept: dict[str, Any], folder: Path) -> Section:
    title = str(kept["title"])
    match kept["kind"]:
        case "table":
            columns = [c if isinstance(c, str) else Column(*c) for c in kept["columns"]]
            rows = [[_cell_of(cell) for cell in row] for row in kept["rows"]]
            return Table(title, columns, rows, kept["note"], has_intervals=kept["has_intervals"])
        case "chart":
            png = folder / f"{Path(kept['name']).name}.png"
            return Chart(title, kept["name"], png.read_bytes, kept["note"])
        case "examples":
            shown = [{**e, "marks": {int(i): mark for i, mark in e["marks"].items()}} for e in kept["examples"]]
            return Examples(title, kept["note"], [Example(**e) for e in shown])
        case "note":
            return Note(title, kept["text"])
        case "lines":
            return Lines(title, kept["text"])
    raise ValueError(f"there is no kind of section {kept['kind']!r}")


def _cell_of(kept: Any) -> Cell:
    nan = float("nan")
    if isinstance(kept, list):
        return Estimate(*(nan if x is None else float(x) for x in kept))
    return kept if kept is None or isinstance(kept, str) else float(kept)
