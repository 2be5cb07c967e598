"""The likelihood of several labels of one preference pair, ties among them.

A member with margin Δ gives a label these probabilities (Davidson 1970, "On extending the Bradley–Terry model to
accommodate ties in paired comparison experiments", eq. 2.1, with worths e^{±Δ/2}):

    P(chosen) = e^{Δ/2} / Z,    P(rejected) = e^{−Δ/2} / Z,    P(tie) = ν / Z,    Z = e^{Δ/2} + e^{−Δ/2} + ν

At ν = 0, `tie_strength`, this is Bradley–Terry: P(chosen) = σ(Δ). P(tie) = ν √(P(chosen) P(rejected)): a tie counts
half for either side, which the threshold of Rao and Kupper (1967) does not give. Without a tie, the odds are e^Δ at
every ν.

Annotators label independently, given the member. So the log-likelihood of the votes of a pair is the sum over its
labels, and a label counts as often as it was given:

    ℓ = n_chosen log P(chosen) + n_rejected log P(rejected) + n_tie log P(tie)       `votes_log_likelihood`

Votes 1:0 without ties are the loss of `preference.py`, and k:0 are k times that.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from renyi.objectives.preference import LogRatios, PreferenceLoss, preference_log_likelihood, preference_margin

TIE_LOSSES = ("sigmoid", "sigmoid_norm")  # losses that are likelihoods of a label, so that a tie has one, too


class Votes(NamedTuple):
    """The numbers of labels of each pair, each [B]."""

    chosen: Tensor
    rejected: Tensor
    tie: Tensor


def outcome_log_probs(margin: Tensor, tie_strength: float = 0.0) -> Tensor:
    """log P of chosen, rejected and tie, [..., 3], from margins Δ [...]. At `tie_strength` 0 the last is −inf.

    Raises:
        ValueError: the tie strength is negative or not finite.
    """
    if not 0 <= tie_strength < math.inf:
        raise ValueError(f"tie_strength is {tie_strength}; it should be a number from 0")
    if tie_strength == 0:
        sides = [logsigmoid(margin), logsigmoid(-margin)]
        return torch.stack([*sides, torch.full_like(margin, -math.inf)], dim=-1)
    tie = torch.full_like(margin, math.log(tie_strength))
    return torch.stack([margin / 2, -margin / 2, tie], dim=-1).log_softmax(dim=-1)


def votes_log_likelihood(ratios: LogRatios, votes: Votes, loss: PreferenceLoss | None = None) -> Tensor:
    """ℓ of the votes of each pair under each member, [M, B].

    For a loss that is no likelihood of a label, ℓ is minus the losses of all labels: that of the pair for each vote
    for its chosen completion, and that of the pair with its sides exchanged for each vote for the rejected one.

    Args:
        ratios: [M, B] log-ratios, as for `preference_log_likelihood`.
        votes: of the pairs.
        loss: the loss and its settings; None is Bradley–Terry with β = 0.1.

    Raises:
        ValueError: there are ties, and the loss gives them no likelihood.
    """
    loss = loss or PreferenceLoss()
    has_ties = bool((votes.tie > 0).any())
    if loss.tie_strength > 0 and len(loss.loss_type) == 1 and loss.loss_type[0] in TIE_LOSSES:
        log_p_MB3 = outcome_log_probs(preference_margin(ratios, loss), loss.tie_strength)
        weight = loss.loss_weights[0] if loss.loss_weights else 1.0
        return weight * (log_p_MB3 * torch.stack(votes, dim=-1).to(log_p_MB3)).sum(dim=-1)
    if has_ties:
        raise ValueError(
            f"ties have no likelihood under {' + '.join(loss.loss_type)}, tie_strength {loss.tie_strength}"
        )
    ell = preference_log_likelihood(ratios, loss)
    turned = ratios._replace(
        chosen=ratios.rejected,
        rejected=ratios.chosen,
        chosen_tokens=ratios.rejected_tokens,
        rejected_tokens=ratios.chosen_tokens,
    )
    if not bool((votes.rejected > 0).any()):
        return votes.chosen * ell
    return votes.chosen * ell + votes.rejected * preference_log_likelihood(turned, loss)


def votes_slope(margin: Tensor, votes: Votes, tie_strength: float = 0.0) -> tuple[Tensor, Tensor]:
    """dℓ/dΔ of the votes of each pair, and the Fisher information about Δ of as many labels. Shapes [..., B].

    Davidson's model is an exponential family in Δ whose statistic is +½ for chosen, −½ for rejected and 0 for a tie.
    So the information is the number of labels times the variance of the statistic, which equals −d²ℓ/dΔ².
    """
    p_chosen, p_rejected, p_tie = outcome_log_probs(margin, tie_strength).exp().unbind(dim=-1)
    labels = votes.chosen + votes.rejected + votes.tie
    # The statistic of each label minus its mean, and its variance, without differences of nearly equal numbers.
    slope = votes.chosen * (p_rejected + p_tie / 2) - votes.rejected * (p_chosen + p_tie / 2)
    slope = slope - votes.tie * (p_chosen - p_rejected) / 2
    return slope, labels * (p_chosen * p_rejected + p_tie * (p_chosen + p_rejected) / 4)


def tie_strength_of(votes: Votes) -> float:
    """ν at which a pair with margin 0 is a tie as often as the labels given are: 2 s / (1 − s) for a share s of ties.

    Raises:
        ValueError: every label is a tie.
    """
    chosen, rejected, tie = (float(x.sum()) for x in votes)
    if chosen + rejected == 0:
        raise ValueError("every label is a tie")
    return 2 * tie / (chosen + rejected)
