"""Measures on tensors: the uncertainty of predictions, and the α above which members should spread.

All of them are pure functions on torch tensors. One of them imports scipy inside. Read next: `uncertainty.py`, then
`stability.py`.
"""

from renyi.measures.stability import (
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
from renyi.measures.uncertainty import (
    DrawUncertainty,
    TokenUncertainty,
    draw_uncertainty,
    log_likelihood_spread,
    responsibility_entropy,
    token_uncertainty,
)

__all__ = [
    "CriticalDirections",
    "CrossFitted",
    "DrawUncertainty",
    "Stability",
    "TokenUncertainty",
    "critical_alpha",
    "critical_directions",
    "cross_fitted",
    "draw_uncertainty",
    "gradient_basis",
    "log_likelihood_spread",
    "random_basis",
    "responsibility_entropy",
    "second_order_change",
    "stability_spectrum",
    "stability_within",
    "token_uncertainty",
]
