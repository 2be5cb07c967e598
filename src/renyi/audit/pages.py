"""The folder that an audit writes: two files of JSON lines, a short page of text, and a page to browse.

OUT/audit.jsonl     a line a row: index, file, row, score, is_contested, group, side, kind, hint
OUT/groups.jsonl    a line a group: the worst first
OUT/audit.md        the shortest account that is still useful, for a review
OUT/report.html     one page that needs nothing else; see `report.html` beside this file
"""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from renyi.audit.findings import KINDS, Audit, Group
from renyi.files import write_whole
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
    verdicts = ({**v._asdict(), **result.measures.get(v.index, {})} for v in result.verdicts)
    write_whole(out / "audit.jsonl", (_line(verdict) for verdict in verdicts))
    write_whole(out / "groups.jsonl", (_line(group) for group in _groups(result)))
    write_whole(out / "audit.md", [in_short(result, title)])
    write_whole(out / "report.html", [_page(result, title)])


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _groups(result: Audit) -> Iterable[dict[str, Any]]:
    for number, group in enumerate(result.groups):
        yield {
            "group": number,
            "kind": group.kind,
            "score": group.score,
            "prompts": group.prompts,
            "sides": [
                {"answer": side.answer, "rows": where, "indices": side.rows, "owners": owners}
                for side, where, owners in zip(group.sides, group.where, _owners(group), strict=True)
            ],
            "sentence": group.sentence,
        }


def _owners(group: Group) -> list[list[int] | None]:
    """The members that own each side; None where there is no ensemble."""
    return [None] * len(group.sides) if group.owners is None else list(group.owners)


def _members(owners: Sequence[int]) -> str:
    return f"member{'' if len(owners) == 1 else 's'} {', '.join(map(str, owners))}"


def said_by_model(result: Audit) -> str:
    """How many rows a model read, which, and what the stability diagnosis says; empty without a model."""
    if not result.measures:
        return ""
    text = f"{len(result.measures):,} rows were read by {printable(str(result.settings['model']))}: "
    text += f"{result.settings['drawn']}."
    if result.stability is None:
        return text
    s = result.stability
    says = "contradict the model" if s["contradicted"] else "are too few to decide" if s["undecided"] else "fit it"
    return (
        f"{text} The critical alpha is {s['critical_alpha']:.2f} ({s['low']:.2f} to {s['high']:.2f}, from "
        f"{s['rows']:,} rows): the rows {says}."
    )


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
    if result.measures:
        lines += [said_by_model(result), ""]
    if not result.groups:
        return "\n".join([*lines, "Nothing was found.", ""])
    lines += ["| kind | groups | rows | what it is |", "|---|---|---|---|"]
    lines += [f"| {k} | {n['groups']:,} | {n['rows']:,} | {KINDS[k]} |" for k, n in result.counts().items()]
    for number, group in enumerate(result.groups[:IN_SHORT]):
        lines += ["", f"## Group {number}: {group.kind}, score {group.score:g}", "", group.sentence, ""]
        lines += [f"- Prompt: {_code(p)}" for p in group.prompts[:3]]
        for side, where, owners in zip(group.sides, group.where, _owners(group), strict=True):
            more = f" and {len(where) - PLACES:,} more" if len(where) > PLACES else ""
            more += f" ({_members(owners)})" if owners else ""
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
        "model": said_by_model(result),
        "groups": [_for_page(number, group) for number, group in enumerate(result.groups)],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = files("renyi.audit").joinpath("report.html").read_text(encoding="utf-8")
    return page.replace("{{DATA}}", text)


def _for_page(number: int, group: Group) -> list[Any]:
    sides = [
        [side.answer, where[:200], len(where), owners or []]
        for side, where, owners in zip(group.sides, group.where, _owners(group), strict=True)
    ]
    return [number, group.kind, group.score, group.prompts, sides, group.sentence, len(group.rows)]
