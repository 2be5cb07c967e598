"""How well an ensemble foretells the votes of several annotators on a pair, and on which pairs they split.

Read next: `preference_quality.py`, which asks for the preferred completion only, and `renyi.objectives.votes`, the
likelihood of votes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import logsigmoid

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


class PairVotes(NamedTuple):
    """What one system says of the votes of each of N pairs: float64 or bool, [N]. `VoteQuality` has their means.

    Attributes:
        labels: how many labels have a probability; ties have none at a `tie_strength` of 0.
        nll: Σ over the labels of −log Σ_m π_m P_m(label), nats.
        nll_together: −log Σ_m π_m Π P_m(label), nats.
        known: how many labels have another one of their pair beside them: all or none.
        nll_held_out: Σ over those of −log P(label | the other labels), nats.
        has_majority: whether one side has more votes than the other.
        is_right: whether the mixture prefers that side.
        preferring: weighted share of members that prefer the chosen completion; a margin of 0 counts half.
        probability: the mixture's probability that it is preferred.
        annotators: share of annotators that prefer it; a tie counts half.
        is_split: whether annotators gave more than one label.
        epistemic, total: uncertainty of the preference, nats.
    """

    labels: Tensor
    nll: Tensor
    nll_together: Tensor
    known: Tensor
    nll_held_out: Tensor
    has_majority: Tensor
    is_right: Tensor
    preferring: Tensor
    probability: Tensor
    annotators: Tensor
    is_split: Tensor
    epistemic: Tensor
    total: Tensor


def pair_votes(scores: Sequence[PairScore], weights: Tensor, tie_strength: float = 0.0) -> PairVotes:
    """What is said of each pair's votes, in float64; arguments and errors as for `evaluate_votes`."""
    if any(s.votes is None for s in scores):
        raise ValueError("some pairs have no votes")
    votes_N3 = torch.tensor([s.votes for s in scores], dtype=torch.float64)
    margin_MN = torch.tensor([s.margin for s in scores], dtype=torch.float64).T
    log_weights = weights.detach().cpu().double().log()
    kept = 3 if tie_strength > 0 else 2
    log_p_MNk, counts_Nk = outcome_log_probs(margin_MN, tie_strength)[..., :kept], votes_N3[:, :kept]
    ell_MN, labels_N = (log_p_MNk * counts_Nk).sum(dim=-1), counts_Nk.sum(dim=-1)
    others_MNk = log_weights[:, None, None] + ell_MN[..., None] - log_p_MNk
    held_out_Nk = (others_MNk.log_softmax(dim=0) + log_p_MNk).logsumexp(dim=0)
    several_N = labels_N > 1
    pi_M1 = log_weights.softmax(dim=0)[:, None]
    mixture_N = (pi_M1 * margin_MN.sigmoid()).sum(dim=0)
    uncertainty = token_uncertainty(logsigmoid(torch.stack([margin_MN, -margin_MN], dim=-1)), log_weights)
    return PairVotes(
        labels=labels_N,
        nll=(renyi_loss(log_p_MNk, 1.0, log_weights) * counts_Nk).sum(dim=-1),
        nll_together=renyi_loss(ell_MN, 1.0, log_weights),
        known=labels_N * several_N,
        nll_held_out=-(held_out_Nk * counts_Nk).sum(dim=-1) * several_N,
        has_majority=votes_N3[:, 0] != votes_N3[:, 1],
        is_right=(mixture_N > 0.5) == (votes_N3[:, 0] > votes_N3[:, 1]),
        preferring=(pi_M1 * ((margin_MN > 0).double() + (margin_MN == 0).double() / 2)).sum(dim=0),
        probability=mixture_N,
        annotators=(votes_N3[:, 0] + votes_N3[:, 2] / 2) / votes_N3.sum(dim=-1),
        is_split=(votes_N3 > 0).sum(dim=-1) > 1,
        epistemic=uncertainty.epistemic,
        total=uncertainty.total,
    )


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
    found = pair_votes(scores, weights, tie_strength)
    labels, known = max(float(found.labels.sum()), 1.0), float(found.known.sum())
    right_N = found.is_right[found.has_majority].double()
    return VoteQuality(
        name=name,
        accuracy=float(right_N.mean()) if len(right_N) else float("nan"),
        nll=float(found.nll.sum()) / labels,
        nll_together=float(found.nll_together.sum()) / labels,
        nll_held_out=float(found.nll_held_out.sum()) / known if known else None,
        calibration=float((found.preferring - found.annotators).square().mean()),
        probability_calibration=float((found.probability - found.annotators).square().mean()),
        split_auroc=_auroc(found.is_split, found.epistemic) if len(weights) > 1 else None,
        split_auroc_total=_auroc(found.is_split, found.total),
        share_bins=_share_bins(found.probability, found.annotators),
    )


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
