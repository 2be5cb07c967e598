"""`--report DIR` of the choice task: which tables, figures and examples its page holds.

It knows what was found and the questions. How a page is written, `renyi.evaluation.page` knows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renyi.evaluation import plots
from renyi.evaluation.bootstrap import Estimate
from renyi.evaluation.page import ExampleSection, FigureSection, Section, TableSection, write_report

if TYPE_CHECKING:
    from renyi.data import Question
    from renyi.evaluation import ChoiceEvaluation, Opinion

PANELS = 4  # systems in the reliability diagram
EXAMPLES = 10


def write_choice_report(
    folder: Path,
    subtitle: str,
    result: Mapping[str, Any],
    evaluation: "ChoiceEvaluation",
    opinion: "Opinion",
    questions: "Sequence[Question]",
    group_name: str | None,
    target_risk: float | None,
    abstention: str | None,
    title: str = "Multiple choice",
) -> None:
    """Write the page of an evaluation of choices, of which preferences between two completions are a kind."""
    sections: list[Section] = [_quality(evaluation), _detection(evaluation)]
    if abstention:
        sections.append(TableSection("Abstention", [], [], abstention))
    sections += _figures(evaluation, opinion, questions, group_name, target_risk)
    if evaluation.groups is not None:
        sections.append(_groups(evaluation, group_name or "group"))
    if any(s.out_of_distribution for s in evaluation.systems):
        sections.append(_elsewhere(evaluation))
    write_report(folder, title, subtitle, result, sections + _contested(evaluation, opinion, questions))


def _text(estimate: Estimate, digits: int = 3) -> str:
    value, low, high = estimate
    if value != value:
        return "–"
    return f"{value:.{digits}f}" + ("" if low != low else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _quality(evaluation: "ChoiceEvaluation") -> TableSection:
    rows = [
        [
            s.name if s.temperature == 1 else f"{s.name} {s.temperature:.2f}",
            *(_text(x) for x in (s.accuracy, s.nll, s.brier, s.ece, s.adaptive_ece)),
        ]
        for s in evaluation.systems
    ]
    note = "NLL in nats a question. ECE in 15 bins of equal width, adaptive of equal mass. Brackets: 95 % bootstrap."
    return TableSection(
        "How good are the answers?", ["", "accuracy", "NLL", "Brier", "ECE", "adaptive ECE"], rows, note
    )


def _detection(evaluation: "ChoiceEvaluation") -> TableSection:
    rows = [
        [f"{s.name}: {name}", *(_text(x) for x in (d.auroc, d.aupr, d.aurc, d.prr, d.accuracy_at_coverage))]
        for i, s in enumerate(evaluation.systems)
        for name, d in s.detection.items()
        if i == 0 or name in ("total", "max_probability")
    ]
    note = (
        "How well each uncertainty tells wrong answers from right ones. AURC, the area under the risk–coverage "
        "curve, is better where lower. Total is the entropy of the answer; max_probability is one minus the largest "
        "probability."
    )
    columns = ["", "AUROC", "AUPR", "AURC", "PRR", "accuracy at 80 %"]
    return TableSection("Does it know where it is wrong?", columns, rows, note)


def _elsewhere(evaluation: "ChoiceEvaluation") -> TableSection:
    rows = [
        [f"{s.name}: {name}", _text(found.auroc), _text(found.aupr)]
        for s in evaluation.systems
        for name, found in s.out_of_distribution.items()
        if s is evaluation.systems[0] or name == "total"
    ]
    return TableSection("Does it notice questions from elsewhere?", ["", "AUROC", "AUPR"], rows)


def _groups(evaluation: "ChoiceEvaluation", name: str) -> TableSection:
    groups = evaluation.groups or []
    members = [f"member {m}" for m in range(len(groups[0].members))]
    rows = [
        [
            g.group,
            f"{g.questions:,}",
            *(f"{x:.3f}" for x in (g.accuracy, g.nll, g.ece)),
            f"{g.epistemic:.4f}",
            *(f"{a:.3f}" for a in g.members),
        ]
        for g in groups
    ]
    note = "Of the mixture; the members' columns are their accuracies."
    columns = [name, "questions", "accuracy", "NLL", "ECE", "epistemic", *members]
    return TableSection(f"By {name}", columns, rows, note)


def _figures(
    evaluation: "ChoiceEvaluation",
    opinion: "Opinion",
    questions: "Sequence[Question]",
    group_name: str | None,
    target_risk: float | None,
) -> list[Section]:
    from renyi.evaluation.metrics import is_right

    systems = evaluation.systems
    is_member = [s.name.startswith("member ") and s.name[7:].isdecimal() for s in systems]
    first = [s for s, member in zip(systems, is_member, strict=True) if not member]
    panels = (first + [s for s, member in zip(systems, is_member, strict=True) if member])[:PANELS]
    found: list[Section] = [
        FigureSection(
            "Is it as right as it is sure?",
            "reliability",
            plots.draw_reliability({s.name: s.reliability for s in panels}),
            "On the diagonal, confidence is the share that is right; below it, the answers are too sure of themselves. "
            "The larger a dot, the more answers it stands for.",
        ),
        FigureSection(
            "What if it may abstain?",
            "risk_coverage",
            plots.draw_risk_coverage({s.name: s.risk["total"] for s in systems}, target_risk),
            "Each system ranks its own answers by the entropy of its own probabilities.",
        ),
    ]
    if len(opinion.weights) > 1:
        kept = sorted(evaluation.most_contested)
        correct = is_right(opinion.mixture(), [q.answer for q in questions])[kept]
        epistemic = opinion.uncertainty()["epistemic"][kept]
        png = plots.draw_disagreement(epistemic, correct)
        found.append(FigureSection("Do members disagree where they are wrong?", "epistemic", png))
    if evaluation.specialisation is not None and len(opinion.weights) > 1:
        spec = evaluation.specialisation
        name = group_name or "group"
        note = (
            f"Share of each {name}'s questions that each member answers best. Adjusted Rand index of best member and "
            f"{name}: {spec.adjusted_rand:.3f} (0 by chance, 1 where one tells the other)."
        )
        png = plots.draw_members_by_groups(spec.led, spec.groups)
        found.append(FigureSection("Who knows what?", "members_by_groups", png, note))
    return found


def _contested(evaluation: "ChoiceEvaluation", opinion: "Opinion", questions: "Sequence[Question]") -> list[Section]:
    from renyi.data import LETTERS

    if len(opinion.weights) == 1:
        return []
    mixture, members = opinion.mixture(), opinion.members()
    epistemic = opinion.uncertainty()["epistemic"]
    columns = ["", "mixture", *(f"member {m}" for m in range(len(members)))]
    shown = [i for i in evaluation.most_contested[:EXAMPLES] if epistemic[i] > 0]
    note = "Every view is a probability; the right answer is green."
    head: list[Section] = [TableSection("What do members disagree on most?", [], [], note)] if shown else []
    return head + [
        ExampleSection(
            f"Row {i + 1}, epistemic {epistemic[i]:.3f} nats",
            questions[i].question.strip(),
            columns,
            [
                [f"{LETTERS[c]}. {text}", *(f"{p[i, c]:.2f}" for p in (mixture, *members))]
                for c, text in enumerate(questions[i].choices)
            ],
            frozenset({questions[i].answer}),
        )
        for i in shown
    ]
