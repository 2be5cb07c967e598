"""The loss of reward models on preference pairs, and the confidence bound on a reward that policies are trained on.

A reward model gives a text a number r. The label "chosen is better than rejected" has the Bradley–Terry likelihood
(Ouyang et al. 2022, arXiv 2203.02155, eq. 1; the margin of Touvron et al. 2023, arXiv 2307.09288, eq. 2)

    ℓ_m = log σ(r_m(chosen) − r_m(rejected) − margin)                             `reward_log_likelihood`

and the members of an ensemble enter the α-Rényi loss by ℓ_m. With `center`, a penalty center · (r(chosen) +
r(rejected))² is subtracted, as in TRL's RewardTrainer.

A pair may have several labels, ties among them. Then r_m(chosen) − r_m(rejected) is the margin of the likelihood of
votes in `votes.py`, and a label counts as often as it was given, with its penalty.

A constant added to all rewards of a member changes no ℓ_m. So rewards of different members can be compared only after
each has been centred, by its own mean over the same texts. A policy that maximises the mean of centred rewards exploits
what a single member is wrong about. The lower bound mean − k · std takes back what members do not agree on (Coste et
al. 2023, arXiv 2310.02743).

Read next: `training/reward.py`, the trainer.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from renyi.objectives.votes import Votes, outcome_log_probs


def reward_log_likelihood(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    center: float | None = None,
    votes: Votes | None = None,
    tie_strength: float = 0.0,
) -> Tensor:
    """ℓ of each pair under each member, [M, B], nats.

    Args:
        chosen: rewards of the chosen texts, [M, B].
        rejected: rewards of the rejected texts, [M, B].
        margin: by how much the chosen reward should be greater, [B]; pairs with votes have none.
        center: weight of the penalty on (chosen + rejected)²; None for no penalty.
        votes: the labels of each pair; None for one label, that chosen is better. Ties that have no probability, at a
            `tie_strength` of 0, are left out.
        tie_strength: ν of `outcome_log_probs`.
    """
    labels_B: Tensor | float = 1.0
    if votes is None:
        ell_MB = logsigmoid(chosen - rejected - margin)
    else:
        counts_B3 = torch.stack(votes, dim=-1).to(chosen)[:, : 3 if tie_strength > 0 else 2]
        log_p_MB3 = outcome_log_probs(chosen - rejected, tie_strength)[..., : counts_B3.shape[-1]]
        ell_MB, labels_B = (log_p_MB3 * counts_B3).sum(dim=-1), counts_B3.sum(dim=-1)
    return ell_MB if center is None else ell_MB - labels_B * center * (chosen + rejected).square()


def reward_bounds(rewards: Tensor, weights: Tensor, width: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and lower confidence bound mean − width · std of members' rewards, each [B].

    Args:
        rewards: centred by member, [M, B].
        weights: of the mixture, [M].
        width: k, standard deviations below the mean.
    """
    mean_B = weights @ rewards
    std_B = (weights @ (rewards - mean_B).square()).sqrt()
    return mean_B, std_B, mean_B - width * std_B
