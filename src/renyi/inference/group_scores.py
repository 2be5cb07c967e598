"""What groups of rows that share one responsibility (`routing_group`) say, from the scores of their rows.

Read next: `score.py` and `pair_scores.py`, which score rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from datasets import Dataset

from renyi.data import GROUP_COLUMN
from renyi.objectives import group_sums, renyi_loss, responsibilities

if TYPE_CHECKING:
    from renyi.ensemble import LoraEnsemble

Scored = TypeVar("Scored", bound=Any)


class GroupScore(NamedTuple):
    """What an ensemble of M members says about the rows of one group together.

    Attributes:
        group: its name.
        rows: how many rows it has.
        log_likelihood: of all of its rows under each member, nats, [M].
        responsibilities: share of the group that each member would learn from at the ensemble's alpha, [M].
        mixture_nll: −log Σ_m π_m p_m(all rows), nats.
    """

    group: str
    rows: int
    log_likelihood: list[float]
    responsibilities: list[float]
    mixture_nll: float


def group_scores(scores: Sequence[Any], groups: Sequence[str], ensemble: "LoraEnsemble") -> list[GroupScore]:
    """Score groups, in alphabetical order.

    Args:
        scores: of N rows, with `log_likelihood`.
        groups: of each row, [N].
        ensemble: that the scores are of.
    """
    names = sorted(set(groups))
    number = {name: i for i, name in enumerate(names)}
    group_N = torch.tensor([number[group] for group in groups])
    ell_MG = group_sums(torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T, group_N, len(names))
    log_weights = ensemble.weights.double().cpu().log()
    r_MG = responsibilities(ell_MG, ensemble.alpha, log_weights)
    counts, nll_G = torch.bincount(group_N).tolist(), renyi_loss(ell_MG, 1.0, log_weights).tolist()
    return [
        GroupScore(name, counts[g], ell_MG[:, g].tolist(), r_MG[:, g].tolist(), nll_G[g])
        for g, name in enumerate(names)
    ]


def with_groups(scores: list[Scored], rows: Dataset, ensemble: "LoraEnsemble") -> list[Scored]:
    """Scores of prepared rows with `group` and `group_responsibilities`, if the rows have groups."""
    if GROUP_COLUMN not in rows.column_names:
        return scores
    of_rows = list(rows[GROUP_COLUMN])
    groups = [str(of_rows[score.index]) for score in scores]
    shared = {g.group: g.responsibilities for g in group_scores(scores, groups, ensemble)}
    return [
        score._replace(group=group, group_responsibilities=shared[group])
        for score, group in zip(scores, groups, strict=True)
    ]
