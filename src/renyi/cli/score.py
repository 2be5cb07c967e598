"""`renyi score`: log-likelihoods and responsibilities of every member on every example, one JSON line each.

Rows are prepared as they were for the ensemble's training, so a flag is needed only to depart from that.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from renyi.cli.console import emit_json, plural, quiet_progress_bars, stream
from renyi.cli.members import members_table
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.errors import ConfigError, SaveError

if TYPE_CHECKING:
    from renyi.inference import MemberSummary, Score

# Flags that depart from how the ensemble's training prepared its rows, and their types.
_PREPARATION = {
    "max_length": (int | None, "tokens after which a row is cut; null for no limit"),
    "dataset_text_field": (str, "the column that holds the text of a row of text"),
    "completion_only_loss": (bool | None, "whether to score completions only"),
    "assistant_only_loss": (bool, "whether to score the assistant's messages only"),
}


def run(argv: Sequence[str]) -> int:
    """Score a dataset under an ensemble."""
    args = _parse(argv)
    err = stream(stderr=True)
    with err.status("loading"):
        import torch
        from datasets import Dataset

        from renyi import LoraEnsemble, data
        from renyi.ensemble.storage import resolve_folder
        from renyi.inference import score, summarise_members

        quiet_progress_bars()
        folder = resolve_folder(args.ensemble)
        preparation = replace(data.Preparation.read(folder), **args.preparation)
        splits = data.load_splits(args.data, args.dataset_config)
        split = args.split or ("test" if "test" in splits else next(iter(splits)))
        rows = data.choose_split(splits, split, args.data, "--split")
        assert isinstance(rows, Dataset)
        ensemble = LoraEnsemble.load(folder, base=args.base)
        tokenizer = data.load_tokenizer_of(folder, ensemble.base_model_name)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        ensemble.to(device)
        prepared = data.prepare(rows, tokenizer, preparation, args.data)

    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("scoring", total=len(prepared))
        scores = score(ensemble, prepared, progress=lambda done: bar.update(task, completed=done))
    _write_lines(scores, args.output)

    members = summarise_members(scores, ensemble.weights)
    if args.json:
        emit_json(_summary(scores, members, ensemble.alpha), stderr=args.output is None)
        return 0
    err.print(members_table(members, "What the members make of it", _in_short(scores, ensemble.alpha)))
    if args.output:
        err.print(f"\n{plural(len(scores), 'line')} in {args.output}", soft_wrap=True)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = StrictParser(prog="renyi score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", metavar="ENSEMBLE", help="folder of an ensemble, or a hub id")
    parser.add_argument("data", metavar="DATA", help="a json, jsonl, csv or parquet file, or the id of a hub dataset")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the lines here; to stdout if not given")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument("--split", help="split to score; by default test if there is one")
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--base", help="base model, if it is no longer where the ensemble says")
    parser.add_argument("--device", help="cuda, cpu, …; by default cuda if there is one")
    kept = parser.add_argument_group("preparation, by default as in training")
    for name, (_, text) in _PREPARATION.items():
        kept.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS)
    args = parse_strictly(parser, argv)
    args.preparation = {
        name: converted(getattr(args, name), hint, None, f"--{name}")
        for name, (hint, _) in _PREPARATION.items()
        if hasattr(args, name)
    }
    if args.output and not args.output.absolute().parent.is_dir():
        raise ConfigError(
            f"there is no folder {args.output.parent}", where="--output", hint="Make it first, or write elsewhere."
        )
    return args


def _write_lines(scores: "Iterable[Score]", output: Path | None) -> None:
    """One JSON object a line; a file appears only when it is whole."""
    lines = (json.dumps(score._asdict()) + "\n" for score in scores)
    if output is None:
        for line in lines:
            print(line, end="")
        return
    partial = output.with_name(f".{output.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"could not be written ({error})", where=str(output), hint="Free some space.") from error


def _summary(scores: "Sequence[Score]", members: "Sequence[MemberSummary]", alpha: float) -> dict[str, Any]:
    tokens = sum(s.tokens for s in scores)
    return {
        "examples": len(scores),
        "tokens": tokens,
        "alpha": alpha,
        "mixture_nll_per_token": sum(s.mixture_nll for s in scores) / tokens,
        "jensen_gap_per_token": sum(s.jensen_gap for s in scores) / tokens,
        "members": [m._asdict() for m in members],
    }


def _in_short(scores: "Sequence[Score]", alpha: float) -> str:
    tokens = sum(s.tokens for s in scores)
    nll, gap = sum(s.mixture_nll for s in scores) / tokens, sum(s.jensen_gap for s in scores) / tokens
    return (
        f"{plural(len(scores), 'example')}, {plural(tokens, 'token')} · mixture NLL {nll:.4f} and Jensen gap {gap:.4f} "
        f"nats a token · α {alpha:g}"
    )
