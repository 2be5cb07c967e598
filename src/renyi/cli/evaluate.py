"""`renyi evaluate`: how good an ensemble and each of its members are, and where these contradict each other.

--task choice: rows are multiple-choice questions. Accuracy, NLL, calibration, and whether uncertainty finds the errors,
of the mixture, every member and baselines; --target_risk finds the uncertainty above which to abstain.

--task perplexity: how likely text is to the mixture, every member and baselines, by group.

--task preference: rows are pairs, prepared, cut and compared with the reference as in the ensemble's training. Of the
probability that the chosen completion is preferred it reports accuracy, NLL, Brier score and calibration, for the
mixture and every member, and the pairs that members contradict each other on.

--task refusal: rows are prompts, safe or unsafe to answer. Every member answers, or has answered. It reports how often
each refuses, how far members differ, and the prompts that split them.

--task sampling: rows are prompts, with answers or without. Of several samples of each it reports how many are right,
how much they vary, how long they are, and how likely to the base; --baseline base puts the base's own beside them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from renyi.cli.console import emit_json, plural, quiet_progress_bars, stream
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import add_reading_flags, check_output, load_ensemble, load_rows, progress_bar, write_lines
from renyi.cli.tables import (
    LONGEST_TEXT,
    WIDEST_TABLE,
    as_json,
    column_values,
    figures_table,
    group_names,
    shortened,
    titled,
)
from renyi.cli.tasks import choice, perplexity, refusal, sampling
from renyi.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from renyi.evaluation import ContestedAUROC, GroupQuality, PreferenceEvaluation
    from renyi.inference import PairScore

LEAD = 30  # characters shown of what both completions begin with


def run(argv: Sequence[str]) -> int:
    """Evaluate an ensemble on a dataset."""
    args = _parse(argv)
    return TASKS[args.task](args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = StrictParser(
        prog="renyi evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reading_flags(parser, "write one JSON line a row here", "print one JSON object and no table", several=True)
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument("--show", default="5", metavar="N", help="how many of the most contested rows to show; 5")
    parser.add_argument("--group", metavar="COLUMN", help="column to report groups of rows by")
    preference = parser.add_argument_group("preference")
    preference.add_argument(
        "--contested", metavar="COLUMN", help="true where annotators contradict each other: is that found?"
    )
    preference.add_argument(
        "--reference", default="kept", help="what margins are measured against: kept, as in training, or base; kept"
    )
    preference.add_argument("--beta", metavar="FLOAT", help="temperature of the margins; by default as in training")
    choice.add_flags(parser)
    refusal.add_flags(parser)
    sampling.add_flags(parser)
    args = parse_strictly(parser, argv)
    args.task = converted(args.task, str, list(TASKS), "--task")
    args.data, *args.more_data = args.data
    if args.more_data and args.task not in READS_SEVERAL:
        raise ConfigError(
            f"{args.more_data[0]!r} is a second file, and --task {args.task} reads one",
            where="DATA",
            hint="Join the files, and tell them apart by a column with --group.",
        )
    args.show = converted(args.show, int, None, "--show")
    args.reference = converted(args.reference, Literal["kept", "base"], None, "--reference")
    args.beta = converted(args.beta, float | None, None, "--beta")
    if args.show < 0:
        raise ConfigError(f"is {args.show}", where="--show", hint="Give a number of rows, or 0 for none.")
    if args.beta is not None and not 0 < args.beta < float("inf"):
        raise ConfigError(f"is {args.beta:g}", where="--beta", hint="Give a number above 0.")
    if args.report and args.task not in REPORTS:
        raise ConfigError(
            f"there is none of --task {args.task}", where="--report", hint=f"There is one of {', '.join(REPORTS)}."
        )
    check_output(args.output)
    return args


# ---- Preferences -----------------------------------------------------------------------------------------------------


def _preference(args: argparse.Namespace) -> int:
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.data import PairPreparation
        from renyi.ensemble import Reference, read_preference
        from renyi.evaluation import evaluate_preference
        from renyi.inference import score_pairs

        quiet_progress_bars()
        rows = load_rows(args)
        groups = group_names(rows, args.group) if args.group else None
        contested = _contested(rows, args.contested, args.data) if args.contested else None
        folder, ensemble, tokenizer = load_ensemble(args)
        preparation = PairPreparation.read(folder)
        loss, reference = read_preference(folder, ensemble)
        loss = loss if args.beta is None else replace(loss, beta=args.beta)
        reference = reference if args.reference == "kept" else Reference(ensemble)
        pairs = preparation.prepare(rows, tokenizer, args.data)

    with progress_bar(err, "scoring", len(pairs)) as progress:
        scores = score_pairs(ensemble, pairs, loss, reference, preparation, progress=progress)
    if args.output:
        write_lines(({**s._asdict(), "epistemic_share": s.epistemic_share} for s in scores), args.output)

    evaluation = evaluate_preference(scores, ensemble.weights, groups, contested)
    against = "base" if reference.start is None else "start"
    settings = {"task": args.task, "loss_type": loss.loss_type, "beta": loss.beta, "reference": against}
    result = settings | as_json(evaluation)
    subtitle = (
        f"{plural(len(scores), 'pair')} · {' + '.join(loss.loss_type)}, beta {loss.beta:g} · margins against "
        + ("the base" if reference.start is None else "each member as its training began")
    )
    if args.report:
        from renyi.cli.tasks.preference_report import write_preference_report

        texts = [_texts(pair, tokenizer) for pair in pairs]
        write_preference_report(args.report, subtitle, result, scores, ensemble.weights, texts, groups, args.group)
    if args.json:
        emit_json(result)
        return 0
    out.print(_qualities(evaluation, ensemble.weights.tolist(), subtitle))
    if evaluation.groups is not None:
        out.print(_group_table(evaluation.groups, args.group))
    if evaluation.contested is not None:
        out.print(_contested_table(evaluation.contested, evaluation.pairs, args.contested))
    shown = [scores[i] for i in evaluation.most_contested[: args.show] if scores[i].epistemic > 0]
    if shown:
        out.print(_most_contested(shown, [_texts(pairs[s.index], tokenizer) for s in shown]))
    if args.output:
        err.print(f"\n{plural(len(scores), 'line')} in {args.output}", soft_wrap=True)
    if args.report:
        err.print(f"\nthe report is {args.report / 'report.html'}", soft_wrap=True)
    return 0


TASKS = {
    "choice": choice.run,
    "perplexity": perplexity.run,
    "preference": _preference,
    "refusal": refusal.run,
    "sampling": sampling.run,
}
READS_SEVERAL = ("choice", "perplexity")
REPORTS = ("choice", "perplexity", "preference")


# ---- Columns ---------------------------------------------------------------------------------------------------------


def _contested(rows: "Dataset", name: str, data: str) -> list[bool]:
    """A column of true and false, or of 1 and 0, in which both occur."""
    values = column_values(rows, name, "--contested")
    for number, value in enumerate(values, start=1):
        if value not in (True, False):
            raise DataError(
                f"is {value!r}", where=f"{data}, row {number}, column {name}", hint="Give true or false in every row."
            )
    if len(set(values)) == 1:
        raise DataError(
            f"is {'true' if values[0] else 'false'} in every row",
            where=f"{data}, column {name}",
            hint="Contested pairs are told from others: there must be both.",
        )
    return list(map(bool, values))


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _qualities(evaluation: "PreferenceEvaluation", weights: Sequence[float], subtitle: str) -> RenderableType:
    """The mixture and every member, and how much of the uncertainty is disagreement."""
    table = figures_table(["", "weight", "accuracy", "NLL", "Brier", "ECE"])
    found = [evaluation.mixture, *evaluation.members]
    names = ["mixture", *(f"member {m}" for m in range(len(weights)))]
    for name, weight, q in zip(names, [None, *weights], found, strict=True):
        cells = ["" if weight is None else f"{weight:.3f}", f"{q.accuracy:.1%}", f"{q.nll:.4f}", f"{q.brier:.4f}"]
        table.add_row(Text(name), *cells, f"{q.ece:.4f}")
    legend = "accuracy: chosen preferred · NLL in nats a pair; a coin has 0.6931 · ECE in 15 bins"
    doubt = (
        f"epistemic uncertainty {evaluation.epistemic:.4f} nats a pair, "
        f"on average {evaluation.epistemic_share:.1%} of a pair's uncertainty"
    )
    return Group(titled("Preferences"), Text(subtitle, "dim"), table, Text(legend, "dim"), Text(), Text(doubt))


def _group_table(groups: "Sequence[GroupQuality]", column: str) -> RenderableType:
    shown = sorted(groups, key=lambda g: -g.pairs)[:WIDEST_TABLE] if len(groups) > WIDEST_TABLE else groups
    table = figures_table([column, "pairs", "accuracy", "epistemic"])
    for group in shown:
        table.add_row(
            Text(shortened(group.group, 40)), f"{group.pairs:,}", f"{group.accuracy:.1%}", f"{group.epistemic:.4f}"
        )
    parts: list[RenderableType] = [titled(f"By {column}"), table]
    if len(shown) < len(groups):
        parts.append(Text(f"and {len(groups) - len(shown)} smaller ones; all with --json", "dim"))
    return Group(*parts)


def _contested_table(found: "ContestedAUROC", pairs: int, column: str) -> RenderableType:
    table = figures_table(["found by", "AUROC"])
    for name, value in (
        ("epistemic uncertainty", found.epistemic),
        ("its share of the total", found.epistemic_share),
        ("total uncertainty", found.total),
    ):
        table.add_row(Text(name), f"{value:.3f}")
    return Group(titled(f"Finding {column}"), Text(f"true of {found.pairs:,} of {plural(pairs, 'pair')}", "dim"), table)


class _Texts(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def _texts(pair: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> _Texts:
    """A pair as the model sees it, shortened: the end of the prompt, and the completions from where they differ."""
    prompt, chosen, rejected = (
        " ".join(str(tokenizer.decode(pair[column], skip_special_tokens=True)).split())
        for column in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    start = alike - LEAD if alike > LONGEST_TEXT // 2 else 0
    return _Texts(
        prompt if len(prompt) <= LONGEST_TEXT else f"…{prompt[1 - LONGEST_TEXT :]}",
        *(shortened("…" * (start > 0) + text[start:], LONGEST_TEXT) for text in (chosen, rejected)),
    )


def _most_contested(scores: "Sequence[PairScore]", texts: Sequence[_Texts]) -> RenderableType:
    import torch

    parts: list[RenderableType] = [
        titled("Most contested pairs"),
        Text("P: probability that the chosen completion is preferred · rows counted from 1", "dim"),
    ]
    for score, text in zip(scores, texts, strict=True):
        of_members = torch.tensor(score.margin, dtype=torch.float64).sigmoid().tolist()
        head = Text.assemble(
            (f"\nrow {score.index + 1}", "bold"),
            f"   P {score.preference:.2f}   members {' '.join(f'{p:.2f}' for p in of_members)}   ",
            (f"epistemic {score.epistemic:.3f} nats, {score.epistemic_share:.0%} of the uncertainty", "dim"),
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for name, value, style in zip(text._fields, text, ("", "green", "red"), strict=True):
            grid.add_row(name, Text(value, style))
        parts += [head, Padding(grid, (0, 0, 0, 2), expand=False)]
    return Group(*parts)
