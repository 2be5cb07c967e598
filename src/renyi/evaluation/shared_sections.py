"""Tables and charts that several tasks show: uncertainty against errors, calibration, and members by groups."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from renyi.evaluation.sections import Cell, Chart, Column, Section, Table, shortened

if TYPE_CHECKING:
    from renyi.evaluation.choice_quality import ChoiceEvaluation, Opinion, System
    from renyi.evaluation.member_groups import Specialisation

PANELS = 4  # systems in the reliability diagram
LONGEST_NAME = 32


def system_name(system: "System") -> str:
    """A system's name, with its temperature where one was fitted."""
    return shortened(
        system.name if system.temperature == 1 else f"{system.name} {system.temperature:.2f}", LONGEST_NAME
    )


def detection(systems: "Sequence[System]", has_intervals: bool) -> Table:
    """How well each uncertainty finds wrong answers: of the first system every one, of the others their entropy."""
    rows: list[list[Cell]] = [
        [shortened(s.name, 24), name, d.auroc, d.aupr, d.aurc, d.prr, d.accuracy_at_coverage]
        for i, s in enumerate(systems)
        for name, d in s.detection.items()
        if i == 0 or name == "total"
    ]
    columns: list[Column | str] = [
        "",
        "uncertainty",
        Column("AUROC", ".3f", "high"),
        Column("AUPR", ".3f", "high"),
        Column("AURC", ".3f", "low"),
        Column("PRR", ".3f", "high"),
        Column("acc. at 80 %", ".3f", "high"),
    ]
    note = "of telling wrong answers from right ones · AURC: lower is better · total is the entropy of the answer"
    return Table("Does it know where it is wrong?", columns, rows, note, has_intervals=has_intervals)


def calibration_charts(
    systems: "Sequence[System]", opinion: "Opinion", kept: Sequence[int], labels: Sequence[int], target: float | None
) -> list[Section]:
    """Reliability, risk against coverage, and whether members disagree where they are wrong."""

    def is_member(system: "System") -> bool:
        return system.name.startswith("member ") and system.name[7:].isdecimal()

    panels = sorted(systems, key=is_member)[:PANELS]

    def reliability() -> bytes:
        from renyi.evaluation import plots

        return plots.draw_reliability({s.name: s.reliability for s in panels})

    def risk() -> bytes:
        from renyi.evaluation import plots

        return plots.draw_risk_coverage({s.name: s.risk["total"] for s in systems}, target)

    def disagreement() -> bytes:
        from renyi.evaluation import plots
        from renyi.evaluation.metrics import is_right

        rows = sorted(kept)
        correct = is_right(opinion.mixture(), list(labels))[rows]
        return plots.draw_disagreement(opinion.uncertainty()["epistemic"][rows], correct)

    found: list[Section] = [
        Chart(
            "Is it as right as it is sure?",
            "reliability",
            reliability,
            "On the diagonal, confidence is the share that is right; below it, the answers are too sure of themselves. "
            "The larger a dot, the more answers it stands for.",
        ),
        Chart(
            "What if it may abstain?",
            "risk_coverage",
            risk,
            "Each system ranks its own answers by the entropy of its own probabilities.",
        ),
    ]
    if len(opinion.weights) > 1:
        found.append(Chart("Do members disagree where they are wrong?", "epistemic", disagreement))
    return found


def groups_table(evaluation: "ChoiceEvaluation", name: str, noun: str) -> Table:
    """How good the mixture is on each group, and each member's accuracy there."""
    groups = evaluation.groups or []
    members = [Column(f"member {m}", ".3f") for m in range(len(groups[0].members))]
    rows: list[list[Cell]] = [
        [
            g.group,
            g.questions,
            g.accuracy,
            g.nll,
            g.ece,
            g.epistemic,
            best_member(g.members, ".1%"),
            *g.members,
        ]
        for g in groups
    ]
    figures = [Column("accuracy", ".1%"), Column("NLL", ".3f"), Column("ECE", ".3f"), Column("epistemic", ".4f")]
    columns: list[Column | str] = [name, Column(noun, ","), *figures, "best member", *members]
    note = "of the mixture; the members' columns are their accuracies"
    return Table(f"By {name}", columns, rows, note, sizes=[g.questions for g in groups], narrow=7)


def who_knows_what(found: "Specialisation", column: str, noun: str) -> list[Section]:
    """The share of each group that each member explains best, as a table and as a chart; nothing of one member."""
    if len(found.led) == 1:
        return []
    members = range(len(found.led))
    rows: list[list[Cell]] = [[group, *(found.led[m][g] for m in members)] for g, group in enumerate(found.groups)]
    index = f"adjusted Rand index of best member and {column}: {found.adjusted_rand:.3f}"
    note = f"share of a {column}'s {noun} that each member explains best · {index} (0 by chance, 1 at best)"
    columns: list[Column | str] = [column, *(Column(f"member {m}", ".0%") for m in members)]

    def draw() -> bytes:
        from renyi.evaluation import plots

        return plots.draw_members_by_groups(found.led, found.groups)

    return [
        Table("Who knows what", columns, rows, note),
        Chart("Who knows what?", "members_by_groups", draw, f"By {column}."),
    ]


def best_member(figures: Sequence[float], form: str, best: Callable[[Sequence[float]], float] = max) -> str:
    """Which member has the best of its figures, and that figure."""
    m = list(figures).index(best(figures))
    return f"{m}: {format(figures[m], form)}"
