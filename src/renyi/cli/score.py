"""`renyi score`: the log-likelihood and responsibility of every member for every example, one JSON line each.

Rows are prepared as in the ensemble's training. Flags are needed only to prepare them in another way. With
--choice_by, rows are multiple-choice questions, and a line has the likelihood of every option under every member. For
an ensemble trained on thumbs, rows with a `label` get rewards and probabilities of thumbs up. Reward models give each
answer a reward (--reward): the mean over members, or a lower confidence bound.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from renyi.cli.console import emit_json, quiet_progress_bars, stream
from renyi.cli.members import shown_table
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import (
    add_draw_flags,
    add_reading_flags,
    check_output,
    load_ensemble,
    load_rows,
    naming_flags,
    progress_bar,
    write_lines,
)
from renyi.errors import ConfigError
from renyi.text import plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.ensemble import LoraEnsemble
    from renyi.inference import MemberSummary, Score
    from renyi.runs.load import Loaded

# Flags that prepare rows otherwise than in the ensemble's training, and their types.
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
        from renyi.inference import members_table, summarise_members

        quiet_progress_bars()
        rows = load_rows(args)
        loaded = load_ensemble(args)
    if loaded.ensemble.gives_rewards:
        return _score_rewards(args, loaded, rows, err)
    if args.choice_by is not None:
        return _score_questions(args, loaded, rows, err)
    if loaded.thumbs is not None and "label" in rows.column_names:
        return _score_thumbs(args, loaded, rows, err)
    with err.status("preparing"), naming_flags(args):
        prepared = loaded.prepare(rows, name=args.data, **args.preparation)
    with progress_bar(err, "scoring", len(prepared)) as progress:
        scores = loaded.score(prepared, progress=progress)
    write_lines(({k: v for k, v in s._asdict().items() if v is not None} for s in scores), args.output)

    ensemble = loaded.ensemble
    members, precision = summarise_members(scores, ensemble.weights), str(ensemble.base.dtype).removeprefix("torch.")
    summary = _summary(scores, members, ensemble, precision)
    if args.json:
        emit_json(summary, stderr=args.output is None)
        return 0
    err.print(shown_table(members_table(members, "What the members make of it", _in_short(summary))))
    if args.output:
        err.print(f"\n{plural(len(scores), 'line')} in {args.output}", soft_wrap=True)
    return 0


def _score_rewards(args: argparse.Namespace, loaded: "Loaded", rows: "Dataset", err: Console) -> int:
    """Write a line for each answer with its reward under every member, their mean, spread and lower bound."""
    for key in ("choice_by", *args.preparation):
        if args.preparation.get(key, getattr(args, key, None)) is not None:
            hint = "Leave it out: a reward is read at the end of a whole answer."
            raise ConfigError("is no setting of reward models", where=f"--{key}", hint=hint)
    with progress_bar(err, "rating", len(rows)) as progress, naming_flags(args):
        scores = loaded.score_rewards(rows, args.reward, lcb_width=args.lcb_width, name=args.data, progress=progress)
    write_lines((s._asdict() for s in scores), args.output)
    mean, spread = (sum(getattr(s, name) for s in scores) / len(scores) for name in ("mean", "std"))
    if args.json:
        emit_json({"answers": len(scores), "mean": mean, "std": spread}, stderr=args.output is None)
        return 0
    err.print(f"{plural(len(scores), 'answer')} · mean reward {mean:.3f} · mean spread of the members {spread:.3f}")
    if args.output:
        err.print(f"{plural(len(scores), 'line')} in {args.output}", soft_wrap=True)
    return 0


def _score_thumbs(args: argparse.Namespace, loaded: "Loaded", rows: "Dataset", err: Console) -> int:
    """Write a line for each thumb, and say how many the mixture predicts."""
    from renyi.data import read_label
    from renyi.inference import members_table, summarise_members

    with progress_bar(err, "scoring", len(rows)) as progress, naming_flags(args):
        scores = loaded.score_thumbs(rows, name=args.data, progress=progress, **args.preparation)
    write_lines(({k: v for k, v in s._asdict().items() if v is not None} for s in scores), args.output)
    labels = [read_label({"label": label}, args.data) for label in rows["label"]]
    right = sum((s.approval > 0.5) == up for s, up in zip(scores, labels, strict=True)) / len(scores)
    members, alpha = summarise_members(scores, loaded.ensemble.weights), loaded.ensemble.alpha
    if args.json:
        found = {"examples": len(scores), "alpha": alpha, "accuracy": right, "members": [m._asdict() for m in members]}
        emit_json(found, stderr=args.output is None)
        return 0
    said = f"{plural(len(scores), 'thumb')}, of which the mixture predicts {right:.1%} · α {alpha:g}"
    loss = "NLL: the loss of a thumb"
    table = members_table(members, "What the members make of it", said, example="thumb", nll=loss)
    err.print(shown_table(table))
    if args.output:
        err.print(f"\n{plural(len(scores), 'line')} in {args.output}", soft_wrap=True)
    return 0


def _score_questions(args: argparse.Namespace, loaded: "Loaded", rows: "Dataset", err: Console) -> int:
    """Write a line for each question. The right option is not used."""
    with progress_bar(err, "scoring", len(rows)) as progress:
        found = loaded.choices(rows, args.choice_by, name=args.data, progress=progress)
    lines = [choice._asdict() for choice in found]
    write_lines(({**line, **line.pop("uncertainty")} for line in lines), args.output)
    if args.output:
        err.print(f"{plural(len(lines), 'line')} in {args.output}", soft_wrap=True)
    return 0


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(prog="renyi score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reading_flags(parser, "write the lines here; to stdout if not given", "print the summary as one JSON object")
    kept = parser.add_argument_group("preparation, by default as in training")
    for name, (_, text) in _PREPARATION.items():
        kept.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS)
    parser.add_argument("--choice_by", help="score the options of questions: letter, text or text_normalised")
    parser.add_argument(
        "--reward", default="mean", help="for reward models: mean, or lcb (lower confidence bound) (default: mean)"
    )
    parser.add_argument(
        "--lcb_width", default="1.0", help="for --reward lcb: standard deviations below the mean (default: 1)"
    )
    add_draw_flags(parser)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args = parse_strictly(parser(), argv)
    if args.choice_by is not None:
        converted(args.choice_by, str, ("letter", "text", "text_normalised"), "--choice_by")
    converted(args.reward, str, ("mean", "lcb"), "--reward")
    args.lcb_width = converted(args.lcb_width, float, None, "--lcb_width")
    args.preparation = {
        name: converted(getattr(args, name), hint, None, f"--{name}")
        for name, (hint, _) in _PREPARATION.items()
        if hasattr(args, name)
    }
    check_output(args.output)
    return args


def _summary(
    scores: "Sequence[Score]", members: "Sequence[MemberSummary]", ensemble: "LoraEnsemble", precision: str
) -> dict[str, Any]:
    from renyi.inference import group_scores

    tokens, alpha = sum(s.tokens for s in scores), ensemble.alpha
    grouped = [s for s in scores if s.group is not None]
    groups = group_scores(grouped, [str(s.group) for s in grouped], ensemble) if grouped else []
    return {
        "examples": len(scores),
        "tokens": tokens,
        "alpha": alpha,
        "precision": precision,
        "mixture_nll_per_token": sum(s.mixture_nll for s in scores) / tokens,
        "jensen_gap_per_token": sum(s.jensen_gap for s in scores) / tokens,
        "members": [m._asdict() for m in members],
        **({"groups": [g._asdict() for g in groups]} if groups else {}),
    }


def _in_short(summary: dict[str, Any]) -> str:
    return (
        f"{plural(summary['examples'], 'example')}, {plural(summary['tokens'], 'token')} · mixture NLL "
        f"{summary['mixture_nll_per_token']:.4f} and Jensen gap {summary['jensen_gap_per_token']:.4f} nats a token · "
        f"α {summary['alpha']:g} · computed in {summary['precision']}"
    )
