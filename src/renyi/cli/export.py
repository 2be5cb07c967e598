"""`renyi export`: an ensemble's members for other programs.

--format adapters writes ordinary PEFT adapters. --format merged writes a plain transformers model for each member.
--format vllm prints the command line that serves all members with vLLM. With --output it also writes the adapters, and
the command line beside them. With --mixture vLLM also serves their exact mixture to `renyi serve --engine vllm`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from renyi.cli.console import emit_json, quiet_progress_bars, stream
from renyi.cli.parser import StrictParser, parse_strictly
from renyi.cli.reading import add_draw_flags, draws_of, naming_flags
from renyi.errors import ConfigError
from renyi.text import plural

if TYPE_CHECKING:
    from renyi.runs.export import Export

FORMATS = ("adapters", "merged", "vllm")


def run(argv: Sequence[str]) -> int:
    """Export an ensemble's members."""
    args = _parse(argv)
    err = stream(stderr=True)
    with err.status("loading"):
        quiet_progress_bars()
        exported = _export(args)
    if args.json:
        emit_json({**exported._asdict(), "members": list(map(str, exported.members))})
        return 0
    if args.output:
        err.print(f"{plural(len(exported.members), 'member')} in {args.output}", soft_wrap=True)
    for folder, weight in zip(exported.members, exported.weights, strict=True):
        err.print(Text(f"  weight {weight:.3f}  {folder}"), soft_wrap=True)
    if args.format == "vllm":
        print(exported.command)
    elif exported.unfit:
        err.print(Text(f"vLLM cannot serve these: {exported.unfit}. --pad_rank may help.", "dim"), soft_wrap=True)
    return 0


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(
        prog="renyi export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ensemble", metavar="ENSEMBLE", help="folder of an ensemble, or a hub id")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of: {', '.join(FORMATS)}")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to make; an earlier export is replaced")
    parser.add_argument("--member", nargs="+", metavar="M", help="which members, counted from 0; by default all")
    parser.add_argument("--base", help="base model, if it is no longer where the ensemble says")
    parser.add_argument(
        "--pad_rank", action="store_true", help="pad adapters with zeros to a rank that vLLM knows; changes no update"
    )
    add_draw_flags(parser)
    parser.add_argument("--mixture", action="store_true", help="load the plugin renyi.vllm, which mixes the members")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args = parse_strictly(parser(), argv)
    if args.format not in FORMATS:
        raise ConfigError(f"there is no {args.format!r}", where="--format", hint=f"Use one of: {', '.join(FORMATS)}.")
    if args.output is None and args.format != "vllm":
        raise ConfigError(
            "is missing", where="--output", hint=f"--format {args.format} needs a folder to write to: --output DIR."
        )
    if args.draws is not None and args.output is None:
        raise ConfigError("needs a folder to write draws to", where="--draws", hint="Give --output DIR.")
    if args.pad_rank and (args.format == "merged" or args.output is None):
        why = "merged members have no rank" if args.format == "merged" else "padded adapters need --output DIR"
        raise ConfigError("cannot be used here", where="--pad_rank", hint=f"Leave it out: {why}.")
    if args.mixture and args.format != "vllm":
        raise ConfigError("cannot be used here", where="--mixture", hint="Add --format vllm, or leave it out.")
    if args.member is not None:
        args.member = [_member(text) for text in args.member]
    return args


def _member(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is no member", where="--member", hint="Give numbers, counted from 0: --member 0 2")
    return int(text)


def _export(args: argparse.Namespace) -> "Export":
    from renyi.runs.export import drawn, export_adapters, export_merged, vllm_command

    draws, seed = draws_of(args)
    if draws is not None:
        with naming_flags(args), drawn(args.ensemble, draws, seed, args.base) as folder:
            if args.format == "merged":
                return export_merged(folder, args.output, args.member, args.base, args.ensemble)
            return export_adapters(
                folder, args.output, args.member, args.base, args.pad_rank, args.ensemble, args.mixture
            )
    if args.format == "merged":
        return export_merged(args.ensemble, args.output, args.member, args.base)
    if args.format == "vllm" and not args.pad_rank:
        command = vllm_command(args.ensemble, args.member, args.base, args.mixture)
        if args.output is None:
            return command
    return export_adapters(args.ensemble, args.output, args.member, args.base, args.pad_rank, mixture=args.mixture)
