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
from renyi.objectives.stability import (
    CriticalDirections,
    CrossFitted,
    Stability,
    critical_alpha,
    critical_directions,
    cross_fitted,
    gradient_basis,
    random_basis,
    second_order_change,
    stability_spectrum,
    stability_within,
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
    "CriticalDirections",
    "CrossFitted",
    "ImportanceWeight",
    "LogRatios",
    "PowerTarget",
    "PreferenceLoss",
    "Stability",
    "TokenUncertainty",
    "completion_log_prob",
    "critical_alpha",
    "critical_directions",
    "cross_fitted",
    "effective_members",
    "gradient_basis",
    "group_partition",
    "importance_weight",
    "jensen_gap",
    "log_likelihood_spread",
    "power_next_token",
    "power_target",
    "preference_log_likelihood",
    "preference_margin",
    "random_basis",
    "renyi_loss",
    "responsibilities",
    "responsibility_entropy",
    "second_order_change",
    "stability_spectrum",
    "stability_within",
    "token_uncertainty",
    "trajectory_balance",
    "trajectory_residual",
]
