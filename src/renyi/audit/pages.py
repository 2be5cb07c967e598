"""The folder that an audit writes: two files of JSON lines, a short page of text, and a page to browse.

OUT/audit.jsonl     a line a row: index, file, row, score, is_contested, group, side, kind
OUT/groups.jsonl    a line a group: the worst first
OUT/audit.md        the shortest account that is still useful, for a review
OUT/report.html     one page that needs nothing else; see `report.html` beside this file
"""

import json
import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from renyi.audit.findings import KINDS, Audit, Group
from renyi.errors import SaveError
from renyi.text import printable

IN_SHORT = 20  # groups that audit.md shows
PLACES = 6  # rows of a side that audit.md names


def write_audit(result: Audit, folder: str | Path, title: str) -> None:
    """Write the four files. Each is written completely or not at all.

    Args:
        result: of `audit`.
        folder: made if it is not there.
        title: what was audited.

    Raises:
        SaveError: something could not be written.
    """
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "audit.jsonl", (json.dumps(v._asdict(), ensure_ascii=False) + "\n" for v in result.verdicts))
        _write(out / "groups.jsonl", (json.dumps(g, ensure_ascii=False) + "\n" for g in _groups(result)))
        _write(out / "audit.md", [in_short(result, title)])
        _write(out / "report.html", [_page(result, title)])
    except OSError as error:
        raise SaveError(
            f"could not be written ({error})", where=str(out), hint="Free some space, or name another."
        ) from error


def _write(path: Path, parts: Iterable[str]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(parts)
    os.replace(part, path)


def _groups(result: Audit) -> Iterable[dict[str, Any]]:
    for number, group in enumerate(result.groups):
        yield {
            "group": number,
            "kind": group.kind,
            "score": group.score,
            "prompts": group.prompts,
            "sides": [
                {"answer": side.answer, "rows": where, "indices": side.rows}
                for side, where in zip(group.sides, group.where, strict=True)
            ],
            "sentence": group.sentence,
        }


def in_short(result: Audit, title: str) -> str:
    """The audit as a short page of Markdown."""
    rows, contested = len(result.verdicts), sum(v.is_contested for v in result.verdicts)
    share = f"{contested:,} rows ({contested / max(1, rows):.1%}) are contested: their score is below 0.5."
    lines = [
        f"# Audit of {printable(title)}",
        "",
        f"{rows:,} rows, {result.statements:,} answers. {share} A score of 1 means that nothing was found.",
        "",
    ]
    if not result.groups:
        return "\n".join([*lines, "Nothing was found.", ""])
    lines += ["| kind | groups | rows | what it is |", "|---|---|---|---|"]
    lines += [f"| {k} | {n['groups']:,} | {n['rows']:,} | {KINDS[k]} |" for k, n in result.counts().items()]
    for number, group in enumerate(result.groups[:IN_SHORT]):
        lines += ["", f"## Group {number}: {group.kind}, score {group.score:g}", "", group.sentence, ""]
        lines += [f"- Prompt: {_code(p)}" for p in group.prompts[:3]]
        for side, where in zip(group.sides, group.where, strict=True):
            more = f" and {len(where) - PLACES:,} more" if len(where) > PLACES else ""
            lines.append(f"- {_code(side.answer) + ': ' if side.answer else ''}{', '.join(where[:PLACES])}{more}")
    if len(result.groups) > IN_SHORT:
        lines += ["", f"{len(result.groups) - IN_SHORT:,} more groups are in groups.jsonl and report.html."]
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    """Text of the data in a form that Markdown shows and does not interpret."""
    short = text if len(text) <= 160 else text[:159] + "…"
    return "`" + short.replace("`", "ˋ") + "`" if short else "(empty)"


def _page(result: Audit, title: str) -> str:
    """One page of HTML. The data are JSON that a script inserts as text, so nothing in them can run."""
    data = {
        "title": printable(title),
        "rows": len(result.verdicts),
        "answers": result.statements,
        "contested": sum(v.is_contested for v in result.verdicts),
        "kinds": [{"kind": k, "about": KINDS[k], **n} for k, n in result.counts().items()],
        "settings": result.settings,
        "groups": [_for_page(number, group) for number, group in enumerate(result.groups)],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = files("renyi.audit").joinpath("report.html").read_text(encoding="utf-8")
    return page.replace("{{DATA}}", text)


def _for_page(number: int, group: Group) -> list[Any]:
    sides = [[side.answer, where[:200], len(where)] for side, where in zip(group.sides, group.where, strict=True)]
    return [number, group.kind, group.score, group.prompts, sides, group.sentence, len(group.rows)]
