"""Which member explains which group of examples, and whether the members are the groups.

`specialisation` compares members with groups; `rows_by_group` is how every evaluation finds the rows of a group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import adjusted_rand_score


class Specialisation(NamedTuple):
    """M members against G groups.

    Attributes:
        groups: their names, in alphabetical order.
        log_likelihood: mean log-likelihood of a group's examples under each member, [M][G], nats an example.
        led: share of a group's examples that each member explains best, with its weight, [M][G]; columns sum to one.
        adjusted_rand: agreement of the best member with the group, by scikit-learn: 1 if each determines the other, 0
            on average by chance (Hubert and Arabie 1985).
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
    size_G = np.bincount(group_N)
    led_MG = [np.bincount(group_N[best_N == m], minlength=len(names)) / size_G for m in range(len(ell_MN))]
    return Specialisation(
        groups=[str(name) for name in names],
        log_likelihood=[(np.bincount(group_N, ell_N) / size_G).tolist() for ell_N in ell_MN],
        led=[led_G.tolist() for led_G in led_MG],
        adjusted_rand=float(adjusted_rand_score(group_N, best_N)),
    )


def rows_by_group(groups: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The rows of each group, ascending; groups in alphabetical order. Linear in the number of rows."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return {group: np.array(rows[group]) for group in sorted(rows)}
