"""The objectives of training: pure functions on tensors that need torch only. Each objective has one file.

Read next: `mixture.py`, the α-Rényi loss.
"""

from renyi.measures.stability import critical_alpha
from renyi.objectives.mixture import (
    QUANTITIES,
    effective_members,
    example_loss,
    example_responsibilities,
    group_sums,
    jensen_gap,
    mixture_log_probs,
    mixture_logits,
    renyi_loss,
    responsibilities,
    routed_units,
    running_log_weights,
)
from renyi.objectives.power import (
    BALANCES,
    ImportanceWeight,
    PowerTarget,
    group_partition,
    importance_weight,
    power_next_token,
    power_target,
    trajectory_balance,
    trajectory_residual,
)
from renyi.objectives.preference import (
    COUPLED_LOSSES,
    F_DIVERGENCES,
    PAIR_LOSSES,
    LogRatios,
    PreferenceLoss,
    completion_log_prob,
    preference_log_likelihood,
    preference_margin,
)
from renyi.objectives.reward import reward_bounds, reward_log_likelihood
from renyi.objectives.thumbs import THUMB_LOSSES, ThumbLoss, reference_point, thumb_log_likelihood, thumb_logit
from renyi.objectives.votes import (
    TIE_LOSSES,
    Votes,
    outcome_log_probs,
    tie_strength_of,
    votes_log_likelihood,
    votes_slope,
)

__all__ = [
    "BALANCES",
    "COUPLED_LOSSES",
    "F_DIVERGENCES",
    "PAIR_LOSSES",
    "QUANTITIES",
    "THUMB_LOSSES",
    "TIE_LOSSES",
    "ImportanceWeight",
    "LogRatios",
    "PowerTarget",
    "PreferenceLoss",
    "ThumbLoss",
    "Votes",
    "completion_log_prob",
    "critical_alpha",
    "effective_members",
    "example_loss",
    "example_responsibilities",
    "group_partition",
    "group_sums",
    "importance_weight",
    "jensen_gap",
    "mixture_log_probs",
    "mixture_logits",
    "outcome_log_probs",
    "power_next_token",
    "power_target",
    "preference_log_likelihood",
    "preference_margin",
    "reference_point",
    "renyi_loss",
    "responsibilities",
    "reward_bounds",
    "reward_log_likelihood",
    "routed_units",
    "running_log_weights",
    "thumb_log_likelihood",
    "thumb_logit",
    "tie_strength_of",
    "trajectory_balance",
    "trajectory_residual",
    "votes_log_likelihood",
    "votes_slope",
]
