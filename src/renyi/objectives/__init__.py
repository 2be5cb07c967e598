"""What is optimised, as pure functions on tensors: one file an objective, importing nothing but torch.

Nothing here knows what a model, a token or a trainer is.
"""

from renyi.objectives.mixture import effective_members, jensen_gap, renyi_loss, responsibilities
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
from renyi.objectives.uncertainty import (
    TokenUncertainty,
    log_likelihood_spread,
    responsibility_entropy,
    token_uncertainty,
)

__all__ = [
    "BALANCES",
    "COUPLED_LOSSES",
    "F_DIVERGENCES",
    "PAIR_LOSSES",
    "ImportanceWeight",
    "LogRatios",
    "PowerTarget",
    "PreferenceLoss",
    "TokenUncertainty",
    "completion_log_prob",
    "effective_members",
    "group_partition",
    "importance_weight",
    "jensen_gap",
    "log_likelihood_spread",
    "power_next_token",
    "power_target",
    "preference_log_likelihood",
    "preference_margin",
    "renyi_loss",
    "responsibilities",
    "responsibility_entropy",
    "token_uncertainty",
    "trajectory_balance",
    "trajectory_residual",
]
