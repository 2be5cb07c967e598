"""Which member explains which group of examples, and whether the members are the groups.

Knows log-likelihoods, weights and names of groups. It does not know what the examples say.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import adjusted_rand_score


class Specialisation(NamedTuple):
    """M members against G groups.

    Attributes:
        groups: their names, in alphabetical order.
        log_likelihood: mean log-likelihood of a group's examples under each member, [M][G], nats an example.
        led: share of a group's examples that each member explains best, weights counted, [M][G]; columns sum to one.
        adjusted_rand: agreement of the best member with the group, by scikit-learn: 1 if each tells the other, 0 on
            average by chance (Hubert and Arabie 1985).
    """

    groups: list[str]
    log_likelihood: list[list[float]]
    led: list[list[float]]
    adjusted_rand: float


def specialisation(log_likelihood: ArrayLike, weights: ArrayLike, groups: Sequence[str]) -> Specialisation:
    """Compare members with groups.

    Args:
        log_likelihood: [M, N], nats.
        weights: mixture weights [M].
        groups: what each example belongs to, [N].

    Raises:
        ValueError: lengths do not match.
    """
    ell_MN, w_M = np.asarray(log_likelihood, np.float64), np.asarray(weights, np.float64)
    if len(groups) != ell_MN.shape[1]:
        raise ValueError(f"there are {len(groups)} groups of {ell_MN.shape[1]} examples")
    with np.errstate(divide="ignore"):
        best_N = (ell_MN + np.log(w_M)[:, None]).argmax(axis=0)
    names, group_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    belongs_NG = np.eye(len(names))[group_N]
    share_NG = belongs_NG / belongs_NG.sum(axis=0)
    return Specialisation(
        groups=[str(name) for name in names],
        log_likelihood=(ell_MN @ share_NG).tolist(),
        led=(np.eye(len(ell_MN))[:, best_N] @ share_NG).tolist(),
        adjusted_rand=float(adjusted_rand_score(group_N, best_N)),
    )
