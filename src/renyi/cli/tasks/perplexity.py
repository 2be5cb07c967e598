"""`renyi evaluate --task perplexity`: how likely text is to the mixture, its members and baselines, by group.

Rows are prepared as they were for the ensemble's training. No arithmetic of its own.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from renyi.cli.console import emit_json, plural, quiet_progress_bars, stream
from renyi.cli.parser import converted
from renyi.cli.reading import Loaded, load_ensemble, progress_bar, write_lines
from renyi.cli.tables import WIDEST_TABLE, as_json, figures_table, shortened, titled
from renyi.cli.tasks.choice import interval, specialisation_table
from renyi.cli.tasks.files import File, baseline_name, file_groups, load_baseline, load_files
from renyi.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from renyi.evaluation import PerplexityEvaluation
    from renyi.inference import Score


def run(args: argparse.Namespace) -> int:
    """Evaluate the likelihood of text."""
    resamples = converted(args.resamples, int, None, "--resamples")
    if resamples < 0:
        raise ConfigError(f"is {resamples}", where="--resamples", hint="Give a number of draws, or 0 for none.")
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.evaluation import evaluate_perplexity

        quiet_progress_bars()
        files = load_files(args, [args.data, *args.more_data])
        grouped = file_groups(files, args.group)
        loaded = load_ensemble(args)

    scores = _scores(loaded, loaded, files, "scoring")
    baselines: dict[str, Sequence[Score]] = {}
    for folder in args.baseline or []:
        name = baseline_name(folder, baselines)
        baselines[name] = _scores(load_baseline(args, folder), loaded, files, f"scoring {name}")
    if args.output:
        write_lines((s._asdict() for s in scores), args.output)
    evaluation = evaluate_perplexity(
        scores,
        loaded.ensemble.weights,
        baselines=baselines,
        groups=grouped[1] if grouped else None,
        resamples=resamples,
    )
    result = {"task": args.task, **as_json(evaluation)}
    if args.report:
        _write_report(args.report, result, evaluation, grouped[0] if grouped else "group")
    if args.json:
        emit_json(result)
        return 0
    out.print(_qualities(evaluation))
    if grouped and evaluation.groups is not None and evaluation.specialisation is not None:
        out.print(_group_table(evaluation, grouped[0]))
        out.print(specialisation_table(evaluation.specialisation, grouped[0]))
    if args.output:
        err.print(f"\n{plural(len(scores), 'line')} in {args.output}", soft_wrap=True)
    if args.report:
        err.print(f"\nthe report is {args.report / 'report.html'}", soft_wrap=True)
    return 0


def _scores(model: Loaded, prepared_as: Loaded, files: "Sequence[File]", what: str) -> "list[Score]":
    """Scores of the rows of all files, numbered through; baselines see the same tokens as the ensemble."""
    from renyi.data import Preparation
    from renyi.inference import score

    preparation = Preparation.read(prepared_as.folder)
    found: list[Score] = []
    for file in files:
        rows = preparation.prepare(file.rows, prepared_as.tokenizer, file.name)
        with progress_bar(stream(stderr=True), what, len(rows)) as progress:
            scores = score(model.ensemble, rows, progress=progress)
        start = len(found)
        found += [s._replace(index=start + s.index) for s in scores]
    return found


def _write_report(folder: Path, result: dict[str, Any], evaluation: "PerplexityEvaluation", column: str) -> None:
    from renyi.evaluation.page import FigureSection, Section, TableSection, write_report
    from renyi.evaluation.plots import draw_members_by_groups

    rows = [
        [s.name, *(f"{x.value:.4f} [{x.low:.4f}, {x.high:.4f}]" for x in (s.nll, s.perplexity))]
        for s in evaluation.systems
    ]
    sections: list[Section] = [
        TableSection("How likely is the text?", ["", "NLL", "perplexity"], rows, "NLL in nats a token. Brackets: 95 %.")
    ]
    if evaluation.groups is not None and evaluation.specialisation is not None:
        members = [f"member {m}" for m in range(len(evaluation.groups[0].members))]
        rows = [
            [g.group, f"{g.examples:,}", f"{g.tokens:,}", *(f"{x:.4f}" for x in (g.nll, g.jensen_gap, *g.members))]
            for g in evaluation.groups
        ]
        columns = [column, "examples", "tokens", "NLL", "Jensen gap", *members]
        spec = evaluation.specialisation
        note = f"Share that each member explains best. Adjusted Rand index {spec.adjusted_rand:.3f}."
        png = draw_members_by_groups(spec.led, spec.groups)
        sections += [
            TableSection(f"By {column}", columns, rows, "Nats a token; the members' columns are their NLL."),
            FigureSection("Who knows what?", "members_by_groups", png, note),
        ]
    write_report(folder, "Perplexity", _subtitle(evaluation), result, sections)


def _subtitle(evaluation: "PerplexityEvaluation") -> str:
    return (
        f"{plural(evaluation.examples, 'example')}, {plural(evaluation.tokens, 'token')} · "
        f"Jensen gap {evaluation.jensen_gap:.4f} nats a token"
    )


def _qualities(evaluation: "PerplexityEvaluation") -> RenderableType:
    table = figures_table(["", "NLL", "perplexity"])
    for s in evaluation.systems:
        table.add_row(Text(shortened(s.name, 32)), interval(s.nll, ".4f"), f"{s.perplexity.value:,.2f}")
    legend = "NLL in nats a token · ± half a 95 % interval over examples"
    return Group(titled("Perplexity"), Text(_subtitle(evaluation), "dim"), table, Text(legend, "dim"))


def _group_table(evaluation: "PerplexityEvaluation", column: str) -> RenderableType:
    groups = evaluation.groups or []
    shown = sorted(groups, key=lambda g: -g.tokens)[:WIDEST_TABLE] if len(groups) > WIDEST_TABLE else groups
    table = figures_table([column, "examples", "tokens", "NLL", "Jensen gap", "best member"])
    for g in shown:
        best = min(range(len(g.members)), key=g.members.__getitem__)
        table.add_row(
            Text(shortened(g.group, 32)),
            f"{g.examples:,}",
            f"{g.tokens:,}",
            f"{g.nll:.4f}",
            f"{g.jensen_gap:.4f}",
            f"{best}: {g.members[best]:.4f}",
        )
    parts: list[RenderableType] = [titled(f"By {column}"), table]
    if len(shown) < len(groups):
        parts.append(Text(f"and {len(groups) - len(shown)} smaller ones; all with --json", "dim"))
    return Group(*parts)
