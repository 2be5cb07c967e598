"""`renyi audit`: find where a fine-tuning dataset contradicts itself, before it is trained on.

DATA are files as `renyi sft` and `renyi dpo` read them, or Alpaca records. No model is needed. It finds prompts with
different answers, preferences that go in a circle, answers that several prompts cannot share, duplicates, and rows that
are empty or cut. Every finding names its rows as file:row. --output writes everything to a folder, with a page to
browse.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from renyi.cli.console import emit_json, stream
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import check_output, progress_bar, write_lines
from renyi.cli.tables import figures_table, shortened, titled
from renyi.errors import ConfigError
from renyi.text import number_text, plural, printable

if TYPE_CHECKING:
    from renyi.audit import Audit

OVER = 1  # exit code if more rows are contested than --fail_over allows


def run(argv: Sequence[str]) -> int:
    """Audit datasets."""
    args = _parse(argv)
    err = stream(stderr=True)
    with err.status("loading"):
        from renyi.audit import audit, cleaned, read_rows, write_audit

        rows, places = read_rows(args.data, args.split)
    with progress_bar(err, "reading", len(rows)) as progress:
        found = audit(rows, near=args.near, text_field=args.dataset_text_field, places=places, progress=progress)
    title = ", ".join(Path(name).name for name in args.data)
    if args.output:
        write_audit(found, args.output, title)
    if args.write:
        kept = cleaned(found, args.drop)
        write_lines((rows[i] for i in kept), args.write)
    too_many = args.fail_over is not None and found.share_contested > args.fail_over
    if args.json:
        emit_json(_summary(found))
        return OVER if too_many else 0
    _show(found, title, args.show)
    if args.output:
        err.print(Text(f"\nthe page to browse is {args.output / 'report.html'}"), soft_wrap=True)
    if args.write:
        left_out = plural(len(rows) - len(kept), "row")
        err.print(Text(f"\n{plural(len(kept), 'row')} in {args.write}; {left_out} left out"), soft_wrap=True)
    if too_many:
        err.print(
            Text(f"\n{found.share_contested:.1%} of the rows are contested, more than --fail_over {args.fail_over:g}")
        )
    return OVER if too_many else 0


def parser() -> StrictParser:
    """What the command reads."""
    from renyi.audit.findings import KINDS

    parser = StrictParser(prog="renyi audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", nargs="+", help="json, jsonl, csv or parquet files, or hub datasets")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="leave audit.jsonl, groups.jsonl, audit.md and report.html"
    )
    parser.add_argument(
        "--near", default="0.85", metavar="SHARE", help="of words in common that makes prompts alike; 0.85"
    )
    parser.add_argument("--show", default="10", metavar="N", help="how many groups to print; 10")
    parser.add_argument("--split", help="split to read; by default train if there is one")
    parser.add_argument("--dataset_text_field", default="text", help="the column of a row of text; text")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the rows that stay, as jsonl")
    parser.add_argument("--drop", nargs="+", default=[], metavar="KIND", help=f"with --write: {', '.join(KINDS)}")
    parser.add_argument("--fail_over", metavar="SHARE", help="exit with 1 if more of the rows are contested")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from renyi.audit.findings import KINDS

    args = parse_strictly(parser(), argv)
    args.near = converted(args.near, float, None, "--near")
    args.show = converted(args.show, int, None, "--show")
    args.fail_over = converted(args.fail_over, float | None, None, "--fail_over")
    if args.show < 0:
        raise ConfigError(f"is {args.show}", where="--show", hint="Give a number of groups, or 0 for none.")
    if args.fail_over is not None and not 0 <= args.fail_over <= 1:
        raise ConfigError(f"is {args.fail_over:g}", where="--fail_over", hint="Give a share between 0 and 1.")
    if unknown := [kind for kind in args.drop if kind not in KINDS]:
        raise ConfigError(f"there is no kind {unknown[0]!r}", where="--drop", hint=f"The kinds are {', '.join(KINDS)}.")
    if args.drop and not args.write:
        raise ConfigError("drops nothing by itself", where="--drop", hint="Add --write FILE.")
    if args.output is not None and args.output.is_file():
        raise ConfigError(f"{args.output} is a file", where="--output", hint="Name a folder; it is made if needed.")
    check_output(args.write)
    return args


def _summary(found: "Audit") -> dict[str, object]:
    return {
        "rows": len(found.verdicts),
        "answers": found.statements,
        "contested": sum(v.is_contested for v in found.verdicts),
        "share_contested": found.share_contested,
        "groups": len(found.groups),
        "kinds": found.counts(),
        "settings": found.settings,
    }


def _show(found: "Audit", title: str, many: int) -> None:
    from renyi.audit import KINDS

    out = stream()
    contested = sum(v.is_contested for v in found.verdicts)
    out.print(titled(f"Audit of {printable(title)}"))
    out.print(f"{plural(len(found.verdicts), 'row')}, {plural(found.statements, 'answer')}", style="dim")
    if not found.groups:
        out.print("\nnothing was found")
        return
    table = figures_table(["kind", "groups", "rows", "what it is"])
    table.columns[3].justify, table.columns[3].no_wrap = "left", False
    for kind, count in found.counts().items():
        table.add_row(kind, number_text(count["groups"]), number_text(count["rows"]), KINDS[kind])
    out.print(table)
    out.print(Text(f"{plural(contested, 'row')} contested: their score is below 0.5; 1 is fine", "dim"))
    for number, group in enumerate(found.groups[:many]):
        out.print(Text.assemble((f"\ngroup {number}", "bold"), (f"   {group.kind}   score {group.score:g}", "dim")))
        out.print(Text(f"  {group.sentence}"))
        for prompt in group.prompts[:2]:
            out.print(Text.assemble(("  prompt  ", "dim"), shortened(prompt, 160)))
        for side, where in zip(group.sides[:4], group.where, strict=False):
            places = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
            out.print(Text.assemble(("  ", ""), (printable(places), "dim"), "  ", shortened(side.answer, 120)))
    if len(found.groups) > many:
        out.print(f"\n{len(found.groups) - many:,} more groups: --show N, or --output DIR for all", style="dim")
