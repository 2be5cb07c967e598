"""The loss of thumbs: single completions that a person found good or bad (KTO, Ethayarajh et al. 2024, 2402.01306).

A policy π and a reference π_ref give a completion the log-ratio log π(y|x) − log π_ref(y|x). Its implied reward is
compared with a reference point z, the policy's divergence from the reference. z is estimated on mismatched prompts and
completions, never below 0, and gets no gradient:

    t = β (log-ratio − z)                                                         `thumb_logit`
    loss = w · (1 − σ(t)) for thumbs up, w · (1 − σ(−t)) for thumbs down          eq. 7

σ(t) is the probability of thumbs up. The members of an ensemble enter the α-Rényi loss by ℓ_m = −loss_m (a Gibbs
posterior). Member m has a reference point z_m of its own, so that ℓ_m is a function of that member alone. The names and
formulas are those of TRL's KTOTrainer, so an ensemble of one member equals that trainer.

The loss is bounded and is not a log-likelihood. So one thumb routes softly: at weights of 1 no responsibility exceeds
e^α / (e^α + M − 1). On thumbs that contradict each other, an ensemble is better off with members that part, whatever
α > 0: for two members with t = ±δ, the loss is ½ − (1/α) log cosh(α (σ(δ) − ½)).

Read next: `training/kto.py`, the trainer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

THUMB_LOSSES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True)
class ThumbLoss:
    """The settings of the loss, under the names of TRL's KTOConfig.

    Attributes:
        beta: β, the strength of the pull to the reference.
        loss_type: "kto", or "apo_zero_unpaired", whose reference point is 0 (D'Oosterlinck et al. 2024, 2408.06266).
        desirable_weight: w of thumbs up.
        undesirable_weight: w of thumbs down.
    """

    beta: float = 0.1
    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def has_reference_point(self) -> bool:
        return self.loss_type == "kto"


def reference_point(log_ratio: Tensor) -> Tensor:
    """z of each member [M]: the mean log-ratio [M, B] of mismatched prompts and completions, at least 0, detached."""
    return log_ratio.detach().mean(dim=1).clamp(min=0)


def thumb_logit(log_ratio: Tensor, reference_point: Tensor, loss: ThumbLoss) -> Tensor:
    """t [M, B]: σ(t) is each member's probability of thumbs up.

    Args:
        log_ratio: of completions to the reference, nats, [M, B].
        reference_point: z of each member, nats, [M].
        loss: the settings.
    """
    return loss.beta * (log_ratio - reference_point[:, None])


def thumb_log_likelihood(logit: Tensor, is_good: Tensor, loss: ThumbLoss) -> Tensor:
    """ℓ = −loss of each thumb under each member, [M, B].

    Args:
        logit: t of each completion, [M, B], from `thumb_logit`.
        is_good: whether the thumb is up, [B], boolean.
        loss: the settings.
    """
    weight_B = torch.where(is_good, loss.desirable_weight, loss.undesirable_weight).to(logit.dtype)
    return -weight_B * (1 - torch.sigmoid(torch.where(is_good, logit, -logit)))
