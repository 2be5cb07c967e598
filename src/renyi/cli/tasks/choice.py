"""`renyi evaluate --task choice`: multiple-choice questions, the ensemble beside its members and baselines.

It reads files, asks the models, and shows what `renyi.evaluation.evaluate_choice` finds; no arithmetic of its own.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from renyi.cli.console import emit_json, plural, quiet_progress_bars, stream
from renyi.cli.parser import converted
from renyi.cli.reading import Loaded, load_ensemble, progress_bar, write_lines
from renyi.cli.tables import LONGEST_TEXT, WIDEST_TABLE, as_json, figures_table, shortened, titled
from renyi.cli.tasks.files import baseline_name, file_groups, load_baseline, load_files
from renyi.errors import ConfigError
from renyi.inference.abstention import ABSTENTION_FILE, write_abstention

if TYPE_CHECKING:
    from renyi.data import Question
    from renyi.evaluation import ChoiceEvaluation, Opinion, RiskThreshold, Specialisation
    from renyi.evaluation.bootstrap import Estimate

OF_ONE = ("total", "max_probability", "perplexity")  # scores that a single member has, too
SCORES = (*OF_ONE, "aleatoric", "epistemic", "expected_pairwise_kl", "reverse_mi", "variation_ratio")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this task, and those it shares with perplexity."""
    shared = parser.add_argument_group("choice and perplexity")
    shared.add_argument(
        "--baseline", action="append", metavar="DIR", help="another ensemble or single adapter to compare with; repeat"
    )
    shared.add_argument(
        "--report", type=Path, metavar="DIR", help="write evaluation.json, figures and report.html here"
    )
    shared.add_argument("--resamples", default="1000", metavar="N", help="draws for bootstrap intervals; 1000")
    choice = parser.add_argument_group("choice")
    choice.add_argument(
        "--choice_by", default="letter", help="what is scored: letter, text, or text_normalised; letter"
    )
    choice.add_argument("--ood", metavar="DATA2", help="questions from elsewhere: does uncertainty tell them apart?")
    choice.add_argument(
        "--calibration",
        metavar="SHARE",
        help="share of the questions not evaluated but calibrated on; 0.2, or 0.5 with --target_risk",
    )
    choice.add_argument("--target_risk", metavar="RISK", help=f"find a threshold and write {ABSTENTION_FILE}")
    choice.add_argument("--delta", default="0.1", help="probability that the threshold's promise fails; 0.1")
    choice.add_argument("--abstain_by", default="total", metavar="SCORE", help=f"{', '.join(SCORES)}; total")


@dataclass(frozen=True)
class _Settings:
    """What the flags of this task say."""

    choice_by: Literal["letter", "text", "text_normalised"]
    resamples: int
    calibration: float
    target_risk: float | None
    delta: float
    abstain_by: str


def run(args: argparse.Namespace) -> int:
    """Evaluate multiple choice."""
    settings = _settings(args)
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.data import read_questions
        from renyi.evaluation import calibration_split, evaluate_choice

        quiet_progress_bars()
        files = load_files(args, [args.data, *args.more_data])
        grouped = file_groups(files, args.group)
        questions = [q for file in files for q in read_questions(file.rows, file.name)]
        elsewhere = [
            q
            for file in (load_files(args, [args.ood]) if args.ood else [])
            for q in read_questions(file.rows, file.name)
        ]
        loaded = load_ensemble(args)
    if settings.abstain_by not in OF_ONE and loaded.ensemble.num_members == 1:
        raise ConfigError("a single member does not disagree", where="--abstain_by", hint="Give total.")

    ensemble, cut = _opinion(args, loaded, questions, settings, "scoring")
    others = {"mixture": _opinion(args, loaded, elsewhere, settings, "scoring --ood")[0]} if elsewhere else {}
    baselines: dict[str, Opinion] = {}
    for folder in args.baseline or []:
        baseline, name = load_baseline(args, folder), baseline_name(folder, baselines)
        baselines[name] = _opinion(args, baseline, questions, settings, f"scoring {name}")[0]
        if elsewhere:
            others[name] = _opinion(args, baseline, elsewhere, settings, f"scoring --ood, {name}")[0]

    labels = [q.answer for q in questions]
    aside, _ = calibration_split(len(questions), settings.calibration)
    evaluation = evaluate_choice(
        ensemble,
        labels,
        baselines=baselines,
        groups=grouped[1] if grouped else None,
        out_of_distribution=others,
        calibration=aside,
        resamples=settings.resamples,
    )
    threshold = _abstention(ensemble.rows(aside), [labels[i] for i in aside], settings, loaded.folder)
    if args.output:
        write_lines(_lines(ensemble, questions, grouped[1] if grouped else None, set(aside.tolist())), args.output)

    result = {
        "task": args.task,
        "choice_by": settings.choice_by,
        "questions_cut": cut,
        **as_json(_without_curves(evaluation)),
        "abstention": as_json(threshold),
    }
    subtitle = f"{plural(evaluation.questions, 'question')} by {settings.choice_by}"
    if evaluation.calibration_questions:
        subtitle += f", {evaluation.calibration_questions:,} more to calibrate on"
    if cut:
        subtitle += f" · {plural(cut, 'prompt')} cut to the model's context"
    abstention = _told(threshold, settings, loaded.folder) if settings.target_risk is not None else None
    if args.report:
        from renyi.cli.tasks.choice_report import write_choice_report

        named = grouped[0] if grouped else None
        write_choice_report(
            args.report, subtitle, result, evaluation, ensemble, questions, named, settings.target_risk, abstention
        )
    if args.json:
        emit_json(result)
        return 0
    out.print(_qualities(evaluation, subtitle))
    out.print(_detections(evaluation))
    if elsewhere:
        out.print(_out_of_distribution(evaluation, len(elsewhere)))
    if grouped and evaluation.groups is not None and evaluation.specialisation is not None:
        out.print(_group_table(evaluation, grouped[0]))
        out.print(specialisation_table(evaluation.specialisation, grouped[0]))
    views = ensemble.log_probs.double().exp()
    epistemic = ensemble.uncertainty().get("epistemic")
    shown = [] if epistemic is None else [i for i in evaluation.most_contested[: args.show] if epistemic[i] > 0]
    if shown:
        out.print(_most_contested(shown, questions, views.tolist(), ensemble.mixture().tolist(), epistemic))
    if abstention:
        out.print(Group(titled("Abstention"), Text(abstention)))
    if args.report:
        err.print(f"\nthe report is {args.report / 'report.html'}", soft_wrap=True)
    if args.output:
        err.print(f"\n{plural(len(questions), 'line')} in {args.output}", soft_wrap=True)
    return 0


def _settings(args: argparse.Namespace) -> _Settings:
    target = converted(args.target_risk, float | None, None, "--target_risk")
    default = 0.2 if target is None else 0.5
    calibration = default if args.calibration is None else converted(args.calibration, float, None, "--calibration")
    delta = converted(args.delta, float, None, "--delta")
    resamples = converted(args.resamples, int, None, "--resamples")
    for value, flag in ((target, "--target_risk"), (delta, "--delta")):
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"is {value:g}", where=flag, hint="Give a number between 0 and 1.")
    if not 0 <= calibration < 1:
        raise ConfigError(f"is {calibration:g}", where="--calibration", hint="Give a share from 0 to below 1.")
    if resamples < 0:
        raise ConfigError(f"is {resamples}", where="--resamples", hint="Give a number of draws, or 0 for none.")
    return _Settings(
        converted(args.choice_by, Literal["letter", "text", "text_normalised"], None, "--choice_by"),
        resamples,
        calibration,
        target,
        delta,
        converted(args.abstain_by, str, SCORES, "--abstain_by"),
    )


def _opinion(
    args: argparse.Namespace, loaded: Loaded, questions: "Sequence[Question]", settings: _Settings, what: str
) -> "tuple[Opinion, int]":
    """What an ensemble thinks of the questions, and how many of them were cut."""
    from renyi.evaluation import Opinion
    from renyi.inference import choice_log_probs, score_choices

    with progress_bar(stream(stderr=True), what, len(questions)) as progress:
        scores = score_choices(loaded.ensemble, questions, loaded.tokenizer, settings.choice_by, progress=progress)
    log_probs, weights = choice_log_probs(scores, settings.choice_by), loaded.ensemble.weights.cpu()
    return Opinion(log_probs, weights, scores.log_likelihood, scores.tokens), scores.cut


# ---- Abstention ------------------------------------------------------------------------------------------------------


def _abstention(opinion: "Opinion", labels: Sequence[int], settings: _Settings, folder: Path) -> "RiskThreshold | None":
    """Find the threshold on the calibration questions, and keep it in the ensemble's folder."""
    from renyi.evaluation import risk_threshold
    from renyi.evaluation.metrics import is_right

    if settings.target_risk is None or not labels:
        return None
    found = risk_threshold(
        opinion.uncertainty()[settings.abstain_by],
        is_right(opinion.mixture(), labels),
        settings.target_risk,
        settings.delta,
    )
    if found is not None:
        kept = {
            "score": settings.abstain_by,
            "threshold": found.threshold,
            "target_risk": found.target_risk,
            "delta": found.delta,
            "calibration_examples": found.calibration_examples,
            "coverage": found.coverage,
            "task": "choice",
            "choice_by": settings.choice_by,
        }
        write_abstention(folder, kept)
    return found


def _told(found: "RiskThreshold | None", settings: _Settings, folder: Path) -> str:
    if found is None:
        return (
            f"No threshold on {settings.abstain_by} keeps the risk at or below {settings.target_risk:g} with "
            f"probability {1 - settings.delta:g}; nothing is written. Calibrate on more questions, or allow more."
        )
    return (
        f"Answering where {settings.abstain_by} ≤ {found.threshold:.4f} keeps the risk at or below "
        f"{found.target_risk:g} with probability {1 - found.delta:g} over {found.calibration_examples:,} calibration "
        f"questions; it answers {found.coverage:.1%} of them, {found.risk:.1%} wrongly. "
        f"Kept in {folder / ABSTENTION_FILE}."
    )


# ---- Lines -----------------------------------------------------------------------------------------------------------


def _lines(
    opinion: "Opinion", questions: "Sequence[Question]", groups: Sequence[str] | None, aside: set[int]
) -> list[dict[str, Any]]:
    mixture, members = opinion.mixture(), opinion.members()
    scores = opinion.uncertainty()
    lines = []
    for i, question in enumerate(questions):
        options = len(question.choices)
        line: dict[str, Any] = {"index": i, "answer": question.answer, "choice": int(mixture[i].argmax())}
        line |= {"probabilities": mixture[i, :options].tolist()}
        line |= {"members": [p[i, :options].tolist() for p in members]}
        line |= {name: float(values[i]) for name, values in scores.items()}
        line |= {} if groups is None else {"group": groups[i]}
        lines.append(as_json(line | {"calibration": i in aside}))
    return lines


def _without_curves(evaluation: "ChoiceEvaluation") -> "ChoiceEvaluation":
    """Risk–coverage curves have a value a question: they are for the figure."""
    return evaluation._replace(systems=[s._replace(risk={}) for s in evaluation.systems])


# ---- Tables ----------------------------------------------------------------------------------------------------------


def interval(estimate: "Estimate", form: str) -> str:
    """A figure with half the width of its interval, or alone without one."""
    value, low, high = estimate
    if value != value:
        return "–"
    if low != low:
        return format(value, form)
    return f"{format(value, form)} ±{format((high - low) / 2, form)}"


def _figure(estimate: "Estimate") -> str:
    return "–" if estimate.value != estimate.value else f"{estimate.value:.3f}"


def _qualities(evaluation: "ChoiceEvaluation", subtitle: str) -> RenderableType:
    table = figures_table(["", "accuracy", "NLL", "Brier", "ECE", "adaptive ECE"])
    for s in evaluation.systems:
        name = s.name if s.temperature == 1 else f"{s.name} {s.temperature:.2f}"
        figures = (interval(x, ".3f") for x in (s.nll, s.brier, s.ece, s.adaptive_ece))
        table.add_row(Text(shortened(name, 32)), interval(s.accuracy, ".1%"), *figures)
    legend = "NLL in nats a question · ECE in 15 bins of equal width, adaptive of equal mass · ± half a 95 % interval"
    return Group(titled("Multiple choice"), Text(subtitle, "dim"), table, Text(legend, "dim"))


def _detections(evaluation: "ChoiceEvaluation") -> RenderableType:
    table = figures_table(["", "uncertainty", "AUROC", "AUPR", "AURC", "PRR", "acc. at 80 %"])
    for i, s in enumerate(evaluation.systems):
        for name, d in s.detection.items():
            if i and name != "total":
                continue
            figures = [interval(d.auroc, ".3f"), _figure(d.aupr), interval(d.aurc, ".3f"), _figure(d.prr)]
            table.add_row(Text(shortened(s.name, 24)), Text(name), *figures, _figure(d.accuracy_at_coverage))
    legend = "of telling wrong answers from right ones · AURC: lower is better · total is the entropy of the answer"
    return Group(titled("Does it know where it is wrong?"), table, Text(legend, "dim"))


def _out_of_distribution(evaluation: "ChoiceEvaluation", number: int) -> RenderableType:
    table = figures_table(["", "uncertainty", "AUROC", "AUPR"])
    for i, s in enumerate(evaluation.systems):
        for name, found in s.out_of_distribution.items():
            if i and name != "total":
                continue
            table.add_row(
                Text(shortened(s.name, 24)), Text(name), interval(found.auroc, ".3f"), interval(found.aupr, ".3f")
            )
    return Group(titled(f"Telling {plural(number, 'question')} from elsewhere"), table)


def _group_table(evaluation: "ChoiceEvaluation", column: str) -> RenderableType:
    groups = evaluation.groups or []
    members = len(groups[0].members)
    shown = sorted(groups, key=lambda g: -g.questions)[:WIDEST_TABLE] if len(groups) > WIDEST_TABLE else groups
    table = figures_table([column, "questions", "accuracy", "NLL", "ECE", "epistemic", "best member"])
    for g in shown:
        best = max(range(members), key=g.members.__getitem__)
        table.add_row(
            Text(shortened(g.group, 32)),
            f"{g.questions:,}",
            f"{g.accuracy:.1%}",
            f"{g.nll:.3f}",
            f"{g.ece:.3f}",
            f"{g.epistemic:.4f}",
            f"{best}: {g.members[best]:.1%}",
        )
    parts: list[RenderableType] = [titled(f"By {column}"), table]
    if len(shown) < len(groups):
        parts.append(Text(f"and {len(groups) - len(shown)} smaller ones; all with --json", "dim"))
    return Group(*parts)


def specialisation_table(found: "Specialisation", column: str) -> RenderableType:
    """Share of each group that each member explains best."""
    members = range(len(found.led))
    table = figures_table([column, *(f"member {m}" for m in members)])
    for g, group in enumerate(found.groups[:WIDEST_TABLE]):
        table.add_row(Text(shortened(group, 32)), *(f"{found.led[m][g]:.0%}" for m in members))
    legend = f"share that each member explains best · adjusted Rand index of best member and {column} "
    return Group(titled("Who knows what"), table, Text(f"{legend}{found.adjusted_rand:.3f}", "dim"))


def _most_contested(
    shown: Sequence[int],
    questions: "Sequence[Question]",
    views: list[list[list[float]]],
    mixture: list[list[float]],
    epistemic: Any,
) -> RenderableType:
    from renyi.data import LETTERS

    parts: list[RenderableType] = [
        titled("Most contested questions"),
        Text("probability of each option: the mixture, then each member · rows counted from 1", "dim"),
    ]
    for i in shown:
        question = questions[i]
        table = figures_table(["", "mixture", *(str(m) for m in range(len(views)))])
        for c, choice in enumerate(question.choices):
            right = c == question.answer
            label = Text(f"{LETTERS[c]}. {shortened(choice, 48)}", "green" if right else "")
            table.add_row(label, f"{mixture[i][c]:.2f}", *(f"{view[i][c]:.2f}" for view in views))
        head = Text.assemble((f"\nrow {i + 1}", "bold"), (f"   epistemic {epistemic[i]:.3f} nats", "dim"))
        parts += [head, Text(shortened(" ".join(question.question.split()), LONGEST_TEXT)), table]
    return Group(*parts)
