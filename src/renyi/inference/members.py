"""What each member learned, computed from the scores of examples, pairs or thumbs.

The scores come from `score.py`, `pair_scores.py` and `thumb_scores.py`. `renyi.runs.learned` asks the members of a run
and keeps the table; `renyi.cli.members` shows one on a terminal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.inference.pair_scores import PairScore
from renyi.inference.score import Score
from renyi.inference.thumb_scores import ThumbScore
from renyi.text import printable


class MemberSummary(NamedTuple):
    """One member among the others, over a set of scored examples.

    Attributes:
        weight: its mixture weight.
        load: its mean responsibility.
        leads: how many examples it explains best, weights counted; a tie goes to the first member.
        nll_led: its NLL on those, nats per token, or per pair or thumb if these were scored; None if there are none.
        nll_others: the same on all others.
        clearest: position of one example in the scores: among those that it leads, the one with the greatest margin
            over the mean member. None if it leads none. For a single member, which has no margin, the likeliest one.
    """

    weight: float
    load: float
    leads: int
    nll_led: float | None
    nll_others: float | None
    clearest: int | None


def summarise_members(
    scores: Sequence[Score] | Sequence[PairScore] | Sequence[ThumbScore], weights: Tensor
) -> list[MemberSummary]:
    """Summarise members from the scores of at least one example and the mixture weights [M]."""
    ell_MN = torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T
    units_N = torch.tensor([s.tokens if isinstance(s, Score) else 1 for s in scores])  # a pair or a thumb is one unit
    loads_M = torch.tensor([s.responsibilities for s in scores], dtype=torch.float64).mean(dim=0)
    leader_N = (ell_MN + weights.cpu().double().log()[:, None]).argmax(dim=0)
    margin_MN = ell_MN - ell_MN.mean(dim=0) if len(weights) > 1 else ell_MN / units_N

    def nll(member: int, chosen_N: Tensor) -> float | None:
        units = int(units_N[chosen_N].sum())
        return float(-ell_MN[member, chosen_N].sum()) / units if units else None

    def summary(member: int) -> MemberSummary:
        led_N = leader_N == member
        clearest = int(margin_MN[member].masked_fill(~led_N, -torch.inf).argmax()) if led_N.any() else None
        return MemberSummary(
            weight=float(weights[member]),
            load=float(loads_M[member]),
            leads=int(led_N.sum()),
            nll_led=nll(member, led_N),
            nll_others=nll(member, ~led_N),
            clearest=clearest,
        )

    return [summary(member) for member in range(len(weights))]


class MemberTable(NamedTuple):
    """A table about members, whose cells are text.

    Attributes:
        title: above it.
        about: a line below the title: what was asked.
        columns: their headings.
        rows: as many cells as columns.
        legend: a line below the table: what the headings mean; may be empty.
        texts: headings of the columns that hold text and no figures.
        written: answers to some prompts: each prompt, and who wrote what. Empty unless members were asked to write.
    """

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: str = ""
    texts: Sequence[str] = ()
    written: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()

    def as_text(self) -> str:
        """The table in lines of plain text, the title in the first one."""
        lines = [self.title, self.about, *self._aligned([self.columns, *self.rows])]
        lines += [self.legend] if self.legend else []
        for prompt, answers in self.written:
            width = max(len(name) for name, _ in answers)
            lines += ["", prompt, *(f"  {name:{width}}  {answer}" for name, answer in answers)]
        return "".join(f"{printable(line, keep='').rstrip()}\n" for line in lines)

    def _aligned(self, rows: Sequence[Sequence[str]]) -> list[str]:
        sides = ["<" if column in self.texts else ">" for column in self.columns]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in rows]


def members_table(
    members: Sequence[MemberSummary],
    title: str,
    about: str,
    clearest: Sequence[str] = (),
    example: str = "example",
    nll: str = "NLL in nats a token",
) -> MemberTable:
    """One row a member.

    Args:
        members: their summaries.
        title: of the table.
        about: what was scored.
        clearest: for each member, the example that it claims most strongly; left out if not given.
        example: the word for an example.
        nll: the meaning and unit of the summaries' NLL.
    """

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    columns = ["member", "weight", "load", "leads", "NLL led", "NLL others"]
    rows = [
        [str(m), f"{s.weight:.3f}", f"{s.load:.1%}", f"{s.leads:,}", figure(s.nll_led), figure(s.nll_others)]
        for m, s in enumerate(members)
    ]
    texts = [f"clearest {example}"] if clearest else []
    rows = [[*row, text] for row, text in zip(rows, clearest, strict=True)] if clearest else rows
    legend = f"load: share of the {example}s it learns from · leads: {example}s it explains best · {nll}"
    return MemberTable(title, about, [*columns, *texts], rows, legend, texts)
