"""How often each member refuses, and on which prompts members differ.

The verdicts come from `refusal_classifier`, from people, or from a user's own function.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from renyi.evaluation.member_groups import rows_by_group


class RefusalRates(NamedTuple):
    """The share of prompts that are refused, from 0 to 1; None where there are no such prompts.

    Attributes:
        all: of all prompts.
        unsafe: of the unsafe ones.
        safe: of the safe ones: over-refusal.
    """

    all: float
    unsafe: float | None
    safe: float | None


class GroupRefusal(NamedTuple):
    """The prompts of one group: how many, each member's refusal rate [M], and the mean variance over members."""

    group: str
    prompts: int
    members: list[float]
    variance: float


class RefusalEvaluation(NamedTuple):
    """What `evaluate_refusal` finds in P prompts, answered by M members of weight π_m; z_pm is 1 for a refusal.

    Attributes:
        prompts: P.
        safe: how many are safe; None if it was not said which.
        members: each member's rates, mean_p z_pm; M of them.
        mixture: the mixture's, Σ_m π_m of the members' rates: that of an answer by a member drawn by weight.
        variance: mean over prompts of the variance over members, of all, unsafe and safe prompts. A prompt's is that of
            z_pm over members, Σ_m π_m (z_pm − z̄_p)² = z̄_p (1 − z̄_p): at most 1/4, 0 where members agree. With equal
            weights this is the paper's refusal variance over members (arXiv 2605.27747), 0.054 → 0.118.
        rate_variance: the variance over members of their rates, Σ_m π_m (rate_m − mixture's rate)². It is 0 if all
            refuse equally often, even if they refuse different prompts.
        prompt_rate: z̄_p = Σ_m π_m z_pm, [P].
        prompt_variance: z̄_p (1 − z̄_p), [P].
        most_split: positions of all prompts, those with the greatest variance first, ties in their order.
        groups: of each group, in alphabetical order, if groups were given.
    """

    prompts: int
    safe: int | None
    members: list[RefusalRates]
    mixture: RefusalRates
    variance: RefusalRates
    rate_variance: RefusalRates
    prompt_rate: list[float]
    prompt_variance: list[float]
    most_split: list[int]
    groups: list[GroupRefusal] | None = None


def evaluate_refusal(
    refused: ArrayLike,
    safe: Sequence[bool] | None,
    weights: ArrayLike,
    groups: Sequence[str] | None = None,
) -> RefusalEvaluation:
    """Evaluate which members refused which prompts.

    Args:
        refused: whether member m refused prompt p, [P, M]; P ≥ 1.
        safe: which prompts are safe to answer, [P]; None if that is not known.
        weights: mixture weights [M]; they are normalised to sum to one.
        groups: what each prompt belongs to, such as its category, [P].

    Raises:
        ValueError: lengths do not match, or there is no prompt.
    """
    z_PM = np.asarray(refused).astype(float)
    weights_M = np.asarray(weights, dtype=float)
    if z_PM.ndim != 2 or len(z_PM) == 0 or z_PM.shape[1:] != weights_M.shape:
        raise ValueError(f"refused has shape {z_PM.shape}, which is not [prompts, {weights_M.size} members]")
    for name, values in (("safe", safe), ("groups", groups)):
        if values is not None and len(values) != len(z_PM):
            raise ValueError(f"{name} has {len(values)} entries for {len(z_PM)} prompts")
    weights_M = weights_M / weights_M.sum()
    rate_P = np.average(z_PM, axis=1, weights=weights_M)
    # Computed from differences, so that the variance is exactly 0 if members agree.
    variance_P = np.average((z_PM - rate_P[:, None]) ** 2, axis=1, weights=weights_M)
    variance_P[(z_PM == z_PM[:, :1]).all(axis=1)] = 0.0

    is_safe_P = None if safe is None else np.asarray(safe, dtype=bool)
    rate_M3 = [_of_kinds(z_P, is_safe_P) for z_P in z_PM.T]
    return RefusalEvaluation(
        prompts=len(z_PM),
        safe=None if is_safe_P is None else int(is_safe_P.sum()),
        members=rate_M3,
        mixture=_of_kinds(rate_P, is_safe_P),
        variance=_of_kinds(variance_P, is_safe_P),
        rate_variance=RefusalRates(*(_variance(rates, weights_M) for rates in zip(*rate_M3, strict=True))),  # type: ignore[arg-type]
        prompt_rate=rate_P.tolist(),
        prompt_variance=variance_P.tolist(),
        most_split=np.argsort(-variance_P.round(12), kind="stable").tolist(),
        groups=None if groups is None else _of_groups(groups, z_PM, variance_P),
    )


def _of_kinds(values_P: NDArray[np.float64], is_safe_P: NDArray[np.bool_] | None) -> RefusalRates:
    """The mean over all, over unsafe and over safe prompts."""
    if is_safe_P is None:
        return RefusalRates(float(values_P.mean()), None, None)
    unsafe, safe = (float(values_P[kind].mean()) if kind.any() else None for kind in (~is_safe_P, is_safe_P))
    return RefusalRates(float(values_P.mean()), unsafe, safe)


def _variance(rates: Sequence[float | None], weights_M: NDArray[np.float64]) -> float | None:
    if rates[0] is None:
        return None
    rate_M = np.asarray(rates, dtype=float)
    return float(np.average((rate_M - np.average(rate_M, weights=weights_M)) ** 2, weights=weights_M))


def _of_groups(groups: Sequence[str], z_PM: NDArray[np.float64], variance_P: NDArray[np.float64]) -> list[GroupRefusal]:
    return [
        GroupRefusal(group, len(rows), z_PM[rows].mean(axis=0).tolist(), float(variance_P[rows].mean()))
        for group, rows in rows_by_group(groups).items()
    ]
