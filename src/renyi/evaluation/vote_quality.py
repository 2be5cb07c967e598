"""How well an ensemble foretells the votes of several annotators on a pair, and on which pairs they split.

Read next: `preference_quality.py`, which asks for the preferred completion only, and `renyi.objectives.votes`, the
likelihood of votes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from renyi.inference.pair_scores import PairScore
from renyi.measures import token_uncertainty
from renyi.objectives import outcome_log_probs, renyi_loss

BINS = 10


class ShareBin(NamedTuple):
    """Pairs whose predicted share is in one bin: how many, and the means of the predicted and the annotators' share."""

    pairs: int
    predicted: float
    annotators: float


class VoteQuality(NamedTuple):
    """How well one system foretells votes.

    Attributes:
        name: of the system.
        accuracy: share of pairs with a majority whose preferred completion the system prefers.
        nll: mean −log probability of a label under the mixture, nats: what it says of an annotator it has not seen.
        nll_together: the same if all labels of a pair are of one member, whichever: −log Σ_m π_m Π P_m(label), nats a
            label. That is the likelihood that training has.
        nll_held_out: mean −log probability of a label whose pair's other labels are known, nats: the members are
            weighted by how well they explain the others. None if no pair has two labels.
        calibration: pairwise calibration error (arXiv 2506.06298): the mean squared difference of the weighted share of
            members that prefer a completion and the share of annotators that do. A tie counts half.
        probability_calibration: the same with the mixture's probability in place of the share of members.
        split_auroc: how well epistemic uncertainty ranks pairs on which annotators split above the others; None if all
            pairs are split, or none, or members cannot disagree.
        split_auroc_total: the same for the total uncertainty.
        share_bins: for the plot of predicted shares against annotators' shares; of the mixture's probability.
    """

    name: str
    accuracy: float
    nll: float
    nll_together: float
    nll_held_out: float | None
    calibration: float
    probability_calibration: float
    split_auroc: float | None
    split_auroc_total: float | None
    share_bins: list[ShareBin]


def evaluate_votes(
    scores: Sequence[PairScore], weights: Tensor, tie_strength: float = 0.0, name: str = "mixture"
) -> VoteQuality:
    """Evaluate the votes of N ≥ 1 pairs, in float64.

    Args:
        scores: of pairs with votes, under M members.
        weights: mixture weights [M].
        tie_strength: ν of the ensemble's loss. At 0 ties have no probability and are left out of likelihoods.
        name: of the system.

    Raises:
        ValueError: a pair has no votes.
    """
    if any(s.votes is None for s in scores):
        raise ValueError("some pairs have no votes")
    votes_N3 = torch.tensor([s.votes for s in scores], dtype=torch.float64)
    margin_MN = torch.tensor([s.margin for s in scores], dtype=torch.float64).T
    log_weights = weights.detach().cpu().double().log()
    kept = 3 if tie_strength > 0 else 2
    log_p_MN3, counts_N3 = outcome_log_probs(margin_MN, tie_strength)[..., :kept], votes_N3[:, :kept]
    labels = float(counts_N3.sum())
    ell_MN = (log_p_MN3 * counts_N3).sum(dim=-1)
    annotators_N = (votes_N3[:, 0] + votes_N3[:, 2] / 2) / votes_N3.sum(dim=-1)
    pi_M1 = log_weights.softmax(dim=0)[:, None]
    members_N = (pi_M1 * ((margin_MN > 0).double() + (margin_MN == 0).double() / 2)).sum(dim=0)
    mixture_N = (pi_M1 * margin_MN.sigmoid()).sum(dim=0)
    has_majority_N = votes_N3[:, 0] != votes_N3[:, 1]
    right_N = (mixture_N > 0.5) == (votes_N3[:, 0] > votes_N3[:, 1])
    sides = torch.nn.functional.logsigmoid(torch.stack([margin_MN, -margin_MN], dim=-1))
    uncertainty = token_uncertainty(sides, log_weights)
    is_split = (votes_N3 > 0).sum(dim=-1) > 1
    return VoteQuality(
        name=name,
        accuracy=float(right_N[has_majority_N].double().mean()) if has_majority_N.any() else float("nan"),
        nll=float((renyi_loss(log_p_MN3, 1.0, log_weights) * counts_N3).sum()) / max(labels, 1),
        nll_together=float(renyi_loss(ell_MN, 1.0, log_weights).sum()) / max(labels, 1),
        nll_held_out=_held_out(log_p_MN3, counts_N3, log_weights),
        calibration=float((members_N - annotators_N).square().mean()),
        probability_calibration=float((mixture_N - annotators_N).square().mean()),
        split_auroc=_auroc(is_split, uncertainty.epistemic) if len(weights) > 1 else None,
        split_auroc_total=_auroc(is_split, uncertainty.total),
        share_bins=_share_bins(mixture_N, annotators_N),
    )


def _held_out(log_p_MNk: Tensor, counts_Nk: Tensor, log_weights: Tensor) -> float | None:
    """Mean −log probability of each label given the other labels of its pair; of pairs with at least two."""
    ell_MN = (log_p_MNk * counts_Nk).sum(dim=-1)
    several_N = counts_Nk.sum(dim=-1) > 1
    if not several_N.any():
        return None
    others_MNk = log_weights[:, None, None] + ell_MN[..., None] - log_p_MNk
    log_p_Nk = (others_MNk.log_softmax(dim=0) + log_p_MNk).logsumexp(dim=0)
    weight_Nk = counts_Nk * several_N[:, None]
    return float(-(log_p_Nk * weight_Nk).sum() / weight_Nk.sum())


def _auroc(is_split: Tensor, score_N: Tensor) -> float | None:
    if is_split.all() or not is_split.any():
        return None
    return float(roc_auc_score(is_split.numpy(), score_N.numpy()))


def _share_bins(predicted_N: Tensor, annotators_N: Tensor) -> list[ShareBin]:
    bin_N = (predicted_N * BINS).long().clamp(max=BINS - 1)
    return [
        ShareBin(int(here.sum()), float(predicted_N[here].mean()), float(annotators_N[here].mean()))
        for here in (bin_N == b for b in range(BINS))
        if here.any()
    ]
