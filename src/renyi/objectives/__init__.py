"""What is optimised, as pure functions on tensors: one file an objective, importing nothing but torch.

Nothing here knows what a model, a token or a trainer is.
"""

from renyi.objectives.mixture import effective_members, jensen_gap, renyi_loss, responsibilities
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
    "COUPLED_LOSSES",
    "F_DIVERGENCES",
    "PAIR_LOSSES",
    "LogRatios",
    "PreferenceLoss",
    "TokenUncertainty",
    "completion_log_prob",
    "effective_members",
    "jensen_gap",
    "log_likelihood_spread",
    "preference_log_likelihood",
    "preference_margin",
    "renyi_loss",
    "responsibilities",
    "responsibility_entropy",
    "token_uncertainty",
]
