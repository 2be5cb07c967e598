"""`renyi audit`: find the rows of a fine-tuning dataset that contradict each other, before you train on them.

DATA are files that `renyi sft` and `renyi dpo` read, or Alpaca records. Without a model it finds prompts with
different answers, preferences that go in a circle, answers that several prompts cannot share, duplicates, and rows that
are empty or cut. With --model it also fits adapters. They find answers that do not fit their prompts, prompts that ask
the same in other words, and rows that answer in two consistent ways. With --ensemble or --members it also says which
members own which side. Every finding names its rows as file:row. --output writes everything to a folder, with a page
to browse.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from renyi.cli.console import emit_json, quiet_progress_bars, stream, typed
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import check_output, naming_flags, progress_bar, write_lines
from renyi.cli.tables import figures_table, shortened, titled
from renyi.errors import ConfigError
from renyi.text import number_text, plural, printable

if TYPE_CHECKING:
    from renyi.audit import Audit

# Settings of the fits: their types, and what they are.
_FIT: dict[str, tuple[Any, str]] = {
    "learning_rate": (float, "learning rate of the fits (default: 5e-4)"),
    "num_train_epochs": (float, "epochs of the fits (default: 1)"),
    "lora_r": (int, "rank of the adapters (default: 4)"),
    "max_length": (int, "tokens after which a row is cut (default: 512)"),
    "alpha": (float, "with --members: alpha of their training (default: 0.8)"),
}
OVER = 1  # exit code if more rows are contested than --fail_over allows


def run(argv: Sequence[str]) -> int:
    """Audit datasets."""
    args = _parse(argv)
    err = stream(stderr=True)
    with err.status("loading"):
        from renyi.audit import audit, cleaned, marked, next_command, read_rows, write_audit

        rows, places = read_rows(args.data, args.split)
    with progress_bar(err, "reading", len(rows)) as progress:
        found = audit(rows, near=args.near, text_field=args.dataset_text_field, places=places, progress=progress)
    if args.model or args.ensemble:
        found = _with_model(args, found, rows, err)
    title = ", ".join(Path(name).name for name in args.data)
    if args.output:
        write_audit(found, args.output, title)
    if args.write:
        kept = cleaned(found, args.drop)
        write_lines(marked(rows, found, kept) if args.sides else (rows[i] for i in kept), args.write)
    command = next_command(found, rows[0], args.data)
    too_many = args.fail_over is not None and found.share_contested > args.fail_over
    if args.json:
        emit_json(_summary(found, command))
        return OVER if too_many else 0
    _show(found, title, args.show)
    if command and found.groups:
        err.print(Text("\nto train on these rows:"))
        err.print(Text(f"  {typed(printable(command))}"), soft_wrap=True)
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


def _with_model(args: argparse.Namespace, found: "Audit", rows: Any, err: Console) -> "Audit":
    """What adapters or an ensemble add."""
    with err.status("loading"):
        from renyi.cli.progress import Progress
        from renyi.runs import audited
        from renyi.runs.build import Watch

        quiet_progress_bars()

    class Shown(Watch):
        """A status line for short work, and a bar for training."""

        def doing(self, what: str) -> AbstractContextManager[Any]:
            return err.status(what)

        @contextmanager
        def training(self) -> Iterator[Sequence[Any]]:
            if args.json:
                yield []
                return
            with Progress() as progress:
                yield [progress]

    common = {
        "folder": args.output,
        "text_field": args.dataset_text_field,
        "max_examples": args.max_examples,
        "seed": args.seed,
        "stages": lambda what, total: progress_bar(err, what, total),
    }
    with naming_flags(args):
        if args.ensemble:
            return audited.audit_with_ensemble(found, rows, args.ensemble, base=args.model, **common)
        settings = {name: getattr(args, name) for name in _FIT if getattr(args, name) is not None}
        if args.members:
            return audited.audit_with_members(
                found, rows, args.model, args.members, watch=Shown(), **common, **settings
            )
        return audited.audit_with_adapter(found, rows, args.model, watch=Shown(), **common, **settings)


def parser() -> StrictParser:
    """What the command reads."""
    from renyi.audit.findings import KINDS, SETS

    parser = StrictParser(prog="renyi audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", nargs="+", help="json, jsonl, csv or parquet files, or hub datasets")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for audit.jsonl, groups.jsonl, audit.md and report.html"
    )
    parser.add_argument(
        "--near",
        default="0.85",
        metavar="SHARE",
        help="share of common words above which prompts are alike (default: 0.85)",
    )
    parser.add_argument("--show", default="10", metavar="N", help="how many groups to print (default: 10)")
    parser.add_argument("--split", help="split to read; by default train if there is one")
    parser.add_argument(
        "--dataset_text_field", default="text", help="the column that holds the text of a row of text (default: text)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the rows that stay, as jsonl")
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="KIND", help=f"with --write: {', '.join((*SETS, *KINDS))}"
    )
    parser.add_argument("--sides", action="store_true", help="with --write: add the columns group and side")
    parser.add_argument(
        "--fail_over", metavar="SHARE", help="exit with code 1 if more than this share of the rows is contested"
    )
    model = parser.add_argument_group("with a model")
    model.add_argument("--model", metavar="BASE", help="base model: adapters are fitted to it and read the rows")
    model.add_argument("--ensemble", metavar="DIR", help="an ensemble that reads the rows; then --model is its base")
    model.add_argument(
        "--members", metavar="M", help="with --model: train an ensemble of M members, which reads the rows"
    )
    model.add_argument(
        "--max_examples",
        default="512",
        metavar="N",
        help="the most rows that a model reads; up to half of them are rows that reading found in a conflict, and the "
        "others are random (default: 512)",
    )
    model.add_argument("--seed", default="0", help="seed of every random choice (default: 0)")
    for name, (_, text) in _FIT.items():
        model.add_argument(f"--{name}", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from renyi.audit.findings import KINDS, SETS

    args = parse_strictly(parser(), argv)
    args.near = converted(args.near, float, None, "--near")
    args.show = converted(args.show, int, None, "--show")
    for name, least in (("max_examples", 4), ("seed", 0), ("members", 2)):
        if getattr(args, name) is not None:
            setattr(args, name, converted(getattr(args, name), int, None, f"--{name}"))
            if getattr(args, name) < least:
                what = f"is {getattr(args, name)}"
                raise ConfigError(what, where=f"--{name}", hint=f"Give a number from {least} on.")
    for name, (kind, _) in _FIT.items():
        if getattr(args, name) is not None:
            setattr(args, name, converted(getattr(args, name), kind, None, f"--{name}"))
    _check_model_flags(args)
    args.fail_over = converted(args.fail_over, float | None, None, "--fail_over")
    if args.show < 0:
        raise ConfigError(f"is {args.show}", where="--show", hint="Give a number of groups, or 0 for none.")
    if args.fail_over is not None and not 0 <= args.fail_over <= 1:
        raise ConfigError(f"is {args.fail_over:g}", where="--fail_over", hint="Give a share between 0 and 1.")
    if unknown := [kind for kind in args.drop if kind not in (*SETS, *KINDS)]:
        known = ", ".join((*SETS, *KINDS))
        raise ConfigError(f"there is no kind {unknown[0]!r}", where="--drop", hint=f"The kinds are {known}.")
    for flag in ("drop", "sides"):
        if getattr(args, flag) and not args.write:
            raise ConfigError(
                "changes what --write writes, and it is missing", where=f"--{flag}", hint="Add --write FILE."
            )
    if args.output is not None and args.output.is_file():
        raise ConfigError(f"{args.output} is a file", where="--output", hint="Name a folder; it is made if needed.")
    check_output(args.write)
    return args


def _check_model_flags(args: argparse.Namespace) -> None:
    if args.members and not args.model:
        raise ConfigError("needs a base model to train on", where="--members", hint="Add --model BASE.")
    if args.members and args.ensemble:
        raise ConfigError(
            "trains a new ensemble, and --ensemble names one", where="--members", hint="Leave one of the two out."
        )
    if args.alpha is not None and not args.members:
        raise ConfigError("sets the training that --members starts", where="--alpha", hint="Add --members M.")
    given = [name for name in _FIT if getattr(args, name) is not None]
    if given and (args.ensemble or not args.model):
        raise ConfigError(
            "sets a fit, and nothing is fitted here", where=f"--{given[0]}", hint="Add --model BASE, or leave it out."
        )


def _summary(found: "Audit", command: str | None) -> dict[str, object]:
    return {
        "rows": len(found.verdicts),
        "answers": found.statements,
        "contested": sum(v.is_contested for v in found.verdicts),
        "share_contested": found.share_contested,
        "groups": len(found.groups),
        "kinds": found.counts(),
        "settings": found.settings,
        "stability": found.stability,
        "next": command,
    }


def _show(found: "Audit", title: str, many: int) -> None:
    from renyi.audit import KINDS, said_by_model

    out = stream()
    contested = sum(v.is_contested for v in found.verdicts)
    out.print(titled(f"Audit of {printable(title)}"))
    out.print(f"{plural(len(found.verdicts), 'row')}, {plural(found.statements, 'answer')}", style="dim")
    if found.measures:
        out.print(Text(said_by_model(found)))
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
