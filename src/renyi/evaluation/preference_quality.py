"""How well an ensemble predicts which completion was chosen, how well its members do, and where these contradict.

Read next: `renyi.inference.pair_scores`, which gives the margins.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import logsigmoid

from renyi.evaluation.member_groups import rows_by_group
from renyi.evaluation.metrics import calibration_error
from renyi.evaluation.reward_quality import RewardQuality
from renyi.evaluation.vote_quality import VoteQuality
from renyi.inference.pair_scores import PairScore
from renyi.measures import token_uncertainty
from renyi.objectives import renyi_loss


class PreferenceQuality(NamedTuple):
    """How well preference probabilities p of the chosen completions fit the choices.

    Attributes:
        accuracy: share of pairs with p > 1/2.
        nll: mean −log p, nats a pair.
        brier: mean (1 − p)², from 0 to 1; a coin has 1/4.
        ece: expected calibration error of the completion that is thought better, in 15 bins of equal width: how far
            its probability max(p, 1 − p) is from the share of pairs on which it was indeed chosen (Guo et al. 2017,
            arXiv 1706.04599).
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


class GroupQuality(NamedTuple):
    """The mixture on the pairs of one group: how many, its accuracy, and its mean epistemic uncertainty in nats."""

    group: str
    pairs: int
    accuracy: float
    epistemic: float


class ContestedAUROC(NamedTuple):
    """How well an uncertainty ranks contested pairs above the others: 1/2 for not at all, 1 for perfectly.

    Attributes:
        pairs: how many are contested.
        epistemic: AUROC of the epistemic uncertainty.
        epistemic_share: AUROC of its share of the total.
        total: AUROC of the total, which a single model also has.
    """

    pairs: int
    epistemic: float
    epistemic_share: float
    total: float


class PreferenceEvaluation(NamedTuple):
    """What `evaluate_preference` finds in N pairs.

    Attributes:
        pairs: N.
        mixture: of the mixture's preference probability Σ_m π_m σ(Δ_m).
        members: of each member's, σ(Δ_m); M of them.
        epistemic: mean over pairs of H[P] − Σ_m π_m H[σ(Δ_m)], nats: the members' disagreement.
        epistemic_share: mean over pairs of its share of H[P]; 0 for a pair without uncertainty.
        most_contested: `PairScore.index` of all pairs, those with the most epistemic uncertainty first.
        groups: of each group, in alphabetical order, if groups were given.
        contested: how well uncertainty finds contested pairs, if these were given.
        worst_group: the least accuracy of a group, if groups were given.
        votes: how well votes are foretold, of the mixture first, if pairs have votes; see `vote_quality.py`.
        baselines: of each other system's preference probability, by name.
        within_members, between_members: means over pairs of the two parts of `epistemic`, nats, if the members are
            draws of members that are distributions.
        rewards: which reward orders pairs best, if the members are reward models; see `reward_quality.py`.
    """

    pairs: int
    mixture: PreferenceQuality
    members: list[PreferenceQuality]
    epistemic: float
    epistemic_share: float
    most_contested: list[int]
    groups: list[GroupQuality] | None = None
    contested: ContestedAUROC | None = None
    worst_group: float | None = None
    votes: list[VoteQuality] | None = None
    baselines: dict[str, PreferenceQuality] | None = None
    within_members: float | None = None
    between_members: float | None = None
    rewards: RewardQuality | None = None


def evaluate_preference(
    scores: Sequence[PairScore],
    weights: Tensor,
    groups: Sequence[str] | None = None,
    contested: Sequence[bool] | None = None,
    baselines: Mapping[str, tuple[Sequence[PairScore], Tensor]] | None = None,
) -> PreferenceEvaluation:
    """Evaluate preferences, in float64, from the members' margins and the mixture weights.

    If most votes of a pair are for its rejected completion, its sides are exchanged first.

    Args:
        scores: of N ≥ 1 pairs, under M members.
        weights: mixture weights [M]; those that `score_pairs` mixed with are the ensemble's.
        groups: what each pair belongs to, such as its source, [N].
        contested: on which pairs annotators contradict each other, [N]; there must be pairs of both kinds.
        baselines: scores of the same pairs under other ensembles, and their weights, by name.

    Raises:
        ValueError: lengths do not match, or all pairs are contested, or none.
    """
    log_p_MN2, log_mixture_N2 = _preferences(scores, weights)
    log_weights = weights.detach().cpu().double().log()
    total_N, epistemic_N, share_N = _uncertainty(log_p_MN2, log_weights)
    worst_first = epistemic_N.argsort(descending=True, stable=True).tolist()
    of_groups = None if groups is None else _of_groups(groups, log_mixture_N2, epistemic_N)
    return PreferenceEvaluation(
        pairs=len(scores),
        mixture=_quality(log_mixture_N2),
        members=[_quality(log_p_N2) for log_p_N2 in log_p_MN2],
        epistemic=float(epistemic_N.mean()),
        epistemic_share=float(share_N.mean()),
        most_contested=[scores[i].index for i in worst_first],
        groups=of_groups,
        contested=None if contested is None else _found(contested, epistemic_N, share_N, total_N),
        worst_group=None if of_groups is None else min(group.accuracy for group in of_groups),
        baselines={name: _quality(_preferences(*given)[1]) for name, given in (baselines or {}).items()},
        within_members=_mean_of([s.within_members for s in scores]),
        between_members=_mean_of([s.between_members for s in scores]),
    )


def is_turned(score: PairScore) -> bool:
    """Whether most votes of a pair are for its rejected completion."""
    return score.votes is not None and score.votes[1] > score.votes[0]


def _preferences(scores: Sequence[PairScore], weights: Tensor) -> tuple[Tensor, Tensor]:
    """log P of preferring the chosen and the rejected completion: of each member [M, N, 2], of the mixture [N, 2]."""
    turned_N = torch.tensor([is_turned(s) for s in scores])
    margin_MN = torch.tensor([s.margin for s in scores], dtype=torch.float64).T
    margin_MN = torch.where(turned_N, -margin_MN, margin_MN)
    log_p_MN2 = logsigmoid(torch.stack([margin_MN, -margin_MN], dim=-1))
    return log_p_MN2, -renyi_loss(log_p_MN2, 1.0, weights.detach().cpu().double().log())


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _uncertainty(log_p_MN2: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Total and epistemic uncertainty of each pair, nats, and the share of the one in the other."""
    found = token_uncertainty(log_p_MN2, log_weights)
    share_N = torch.where(found.total > 0, found.epistemic / found.total, 0.0)
    return found.total, found.epistemic, share_N.clamp(max=1.0)  # rounding could give more than 1


def _quality(log_p_N2: Tensor) -> PreferenceQuality:
    """From log-probabilities of preferring the chosen and the rejected completion."""
    is_right_N = _is_right(log_p_N2)
    # A confidence of 1 lies on the last bin's upper edge, and torchmetrics would add a bin for it.
    confidence_N = log_p_N2.amax(dim=-1).exp().clamp(max=1 - torch.finfo(torch.float64).eps)
    return PreferenceQuality(
        accuracy=float(is_right_N.double().mean()),
        nll=float(-log_p_N2[:, 0].mean()),
        brier=float((2 * log_p_N2[:, 1]).exp().mean()),
        ece=calibration_error(confidence_N, is_right_N),
    )


def _is_right(log_p_N2: Tensor) -> Tensor:
    return log_p_N2[:, 0] > log_p_N2[:, 1]


def _of_groups(groups: Sequence[str], log_mixture_N2: Tensor, epistemic_N: Tensor) -> list[GroupQuality]:
    if len(groups) != len(epistemic_N):
        raise ValueError(f"there are {len(groups)} groups of {len(epistemic_N)} pairs")
    is_right_N = _is_right(log_mixture_N2).double()
    return [
        GroupQuality(group, len(rows), float(is_right_N[rows].mean()), float(epistemic_N[rows].mean()))
        for group, rows in rows_by_group(groups).items()
    ]


def _found(contested: Sequence[bool], epistemic_N: Tensor, share_N: Tensor, total_N: Tensor) -> ContestedAUROC:
    if len(set(map(bool, contested))) < 2:
        raise ValueError("all pairs are contested, or none: nothing is to be told apart")
    epistemic, share, total = (float(roc_auc_score(contested, x.numpy())) for x in (epistemic_N, share_N, total_N))
    return ContestedAUROC(sum(map(bool, contested)), epistemic, share, total)
