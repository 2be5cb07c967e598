"""What each member learned, computed from the scores of examples, pairs or thumbs.

The scores come from `score.py`, `pair_scores.py` and `thumb_scores.py`. `renyi.cli.members` shows the summaries as a
table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.inference.pair_scores import PairScore
from renyi.inference.score import Score
from renyi.inference.thumb_scores import ThumbScore


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
