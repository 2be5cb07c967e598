"""What an audit finds: groups of rows that belong together, and a verdict for each row.

Read next: `reading.py`, which fills these from text alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from renyi.text import printable

SHOWN = 400  # characters of a prompt or an answer that a group keeps
CONTESTED = 0.5  # a row of a lower score is contested

# Each kind of finding, and what it is in one line.
KINDS = {
    "duplicate_conflict": "the same prompt has answers that differ",
    "near_duplicate_conflict": "prompts with the same words that matter have answers that differ",
    "systematic_variation": "many rows answer in one way and many in another, and each way is consistent",
    "probable_error": "the answer gains no more from its own prompt than from prompts of other rows",
    "preference_cycle": "answers to one prompt are preferred in a circle",
    "shared_answer": "prompts that differ in what decides the answer share one answer",
    "empty": "there is no prompt, or no answer",
    "cut": "the answer stops in the middle of a sentence, where others end with a full stop",
    "duplicate": "the row says the same as an earlier one",
}
# Names for several kinds at once, as `--drop` takes them.
SETS = {"errors": ("empty", "cut", "probable_error"), "duplicates": ("duplicate",)}


class Side(NamedTuple):
    """One of the competing answers of a group.

    Attributes:
        answer: as its first row has it, shortened.
        rows: of the dataset, counted from 0, ascending.
    """

    answer: str
    rows: list[int]


@dataclass
class Group:
    """Rows that contradict each other, or share another fault.

    Attributes:
        kind: one of `KINDS`.
        score: in [0, 1]. Near 0 the rows almost surely have a fault; 1 means that nothing is wrong.
        prompts: of the group, shortened, each once.
        sides: the competing answers; one, where nothing competes.
        sentence: what was found, in a sentence that can be read alone.
        where: "file:row" of each side's rows, the row counted from 1.
        owners: the members that explain each side; None without an ensemble.
    """

    kind: str
    score: float
    prompts: list[str]
    sides: list[Side]
    sentence: str = ""
    where: list[list[str]] = field(default_factory=list)
    owners: list[list[int]] | None = None

    @property
    def rows(self) -> list[int]:
        return sorted({row for side in self.sides for row in side.rows})


class RowVerdict(NamedTuple):
    """What the audit says of one row.

    Attributes:
        index: of the row, counted from 0.
        file: the file that has it.
        row: its number there, counted from 1.
        score: in [0, 1]: the lowest score of its groups; 1 if it is in none.
        is_contested: whether the score is below 0.5.
        group: number of the group that gave the score; None if there is none.
        side: its side in that group, counted from 0.
        kind: of that group.
        hint: that group's sentence; None if it is in no group.
    """

    index: int  # type: ignore[assignment]
    file: str
    row: int
    score: float
    is_contested: bool
    group: int | None
    side: int | None
    kind: str | None
    hint: str | None


@dataclass
class Audit:
    """What `audit` returns.

    Attributes:
        verdicts: one a row.
        groups: the worst first.
        statements: how many answers were compared.
        settings: the thresholds in force.
        measures: what a model measured, by the number of the row; empty without a model. `fit`, in [0, 1]: how much
            better the answer fits its own prompt than others, or the probability of a pair's label. `nll`, nats, of
            `tokens`. `loadings` on the leading directions, in units of the root mean square, and whether the row was
            `held_out` from the adapter. `responsibilities` [M], `owner`, and `epistemic`, nats.
        stability: figures of the stability diagnosis: `critical_alpha`, `low`, `high` and more; None without one.
    """

    verdicts: list[RowVerdict]
    groups: list[Group]
    statements: int
    settings: dict[str, Any]
    measures: dict[int, dict[str, Any]] = field(default_factory=dict)
    stability: dict[str, Any] | None = None

    @property
    def share_contested(self) -> float:
        """Share of the rows that are contested."""
        return sum(v.is_contested for v in self.verdicts) / max(1, len(self.verdicts))

    def counts(self) -> dict[str, dict[str, int]]:
        """Groups and rows of each kind that was found."""
        found: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            of_kind = [g for g in self.groups if g.kind == kind]
            if of_kind:
                found[kind] = {"groups": len(of_kind), "rows": len({r for g in of_kind for r in g.rows})}
        return found


def shortened(text: str, limit: int = SHOWN) -> str:
    """Text in one line of printable characters, with … where it was cut."""
    line = " ".join(printable(text[: 4 * limit]).split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 1] + "…"


def verdicts_of(groups: Sequence[Group], places: Sequence[tuple[str, int]]) -> list[RowVerdict]:
    """One verdict a row, from the groups that it is in.

    Args:
        groups: with their final order.
        places: file and number of every row.
    """
    worst: dict[int, tuple[float, int, int]] = {}
    for number, group in enumerate(groups):
        for side, answers in enumerate(group.sides):
            for row in answers.rows:
                worst[row] = min(worst.get(row, (2.0, 0, 0)), (group.score, number, side))
    verdicts = []
    for index, (file, row) in enumerate(places):
        if index in worst:
            score, number, side_of = worst[index]
            contested = score < CONTESTED
            group = groups[number]
            verdicts.append(RowVerdict(index, file, row, score, contested, number, side_of, group.kind, group.sentence))
        else:
            verdicts.append(RowVerdict(index, file, row, 1.0, False, None, None, None, None))
    return verdicts
