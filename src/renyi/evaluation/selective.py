"""The uncertainty above which to abstain, so that the share of wrong answers among the rest stays below a target.

Read next: `renyi.inference.abstention`, the file that keeps the threshold.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom

MOST_CANDIDATES = 100


class RiskThreshold(NamedTuple):
    """A threshold on an uncertainty, and the evidence for its promise.

    Attributes:
        threshold: answer where the uncertainty is at most this.
        coverage: share of the test part of the calibration examples that is answered.
        risk: share of the answered ones that is wrong.
        risk_bound: upper confidence bound of the true share, at confidence 1 − delta; at most the target.
        target_risk: the risk that was asked for.
        delta: greatest probability that a calibration set gives a threshold that breaks the promise.
        calibration_examples: the number of examples, both parts together.
    """

    threshold: float
    coverage: float
    risk: float
    risk_bound: float
    target_risk: float
    delta: float
    calibration_examples: int


def risk_threshold(
    uncertainty: ArrayLike, correct: ArrayLike, target_risk: float, delta: float = 0.1, seed: int = 0
) -> RiskThreshold | None:
    """The largest threshold found whose selective risk is guaranteed, or None if there is none.

    **The guarantee.** With probability at least 1 − delta over the draw of the calibration examples, the selective
    risk P(wrong | uncertainty ≤ threshold) of new examples from the same distribution is at most `target_risk`. It is
    exact for any N and for any uncertainty, good or bad, with or without ties. Calibration and new examples must be
    independent draws from one distribution. The guarantee is about the average over all answers, not about a single
    answer or group, and with probability up to delta it fails.

    **How.** Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052) with the binomial tail as p-value. A fifth of
    the examples proposes candidate thresholds (its quantiles) and a first candidate: the one at which its errors are
    the clearest evidence of a risk that is low enough. The other examples test the candidates. Their errors below a
    fixed threshold are binomial. From the first candidate on, in ascending order, each is tested at level delta by the
    Clopper–Pearson upper bound of its risk, until one fails. This is fixed-sequence testing: the first threshold whose
    risk is too high passes with probability at most delta, and if it fails no later one is tested.

    Args:
        uncertainty: [N].
        correct: [N] bool.
        target_risk: between 0 and 1, excluded.
        delta: between 0 and 1, excluded.
        seed: of the split.

    Raises:
        ValueError: lengths or ranges do not fit.
    """
    scores, right = np.asarray(uncertainty, np.float64), np.asarray(correct, bool)
    if scores.shape != right.shape or scores.ndim != 1:
        raise ValueError(f"uncertainty {scores.shape} and correct {right.shape} are no pair of vectors")
    if not (0 < target_risk < 1 and 0 < delta < 1):
        raise ValueError(f"target_risk {target_risk} and delta {delta} must be between 0 and 1")
    if len(scores) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(scores))
    pilot, tested = np.split(order, [max(1, len(scores) // 5)])
    candidates = _candidates(scores[pilot])
    first = binom.cdf(*_errors(scores[pilot], right[pilot], candidates), target_risk).argmin() if len(candidates) else 0
    candidates = candidates[first:]
    errors, numbers = _errors(scores[tested], right[tested], candidates)
    bounds = risk_bound(errors, numbers, delta)
    passed = int((bounds <= target_risk).cumprod().sum())
    if passed == 0:
        return None
    best = passed - 1
    return RiskThreshold(
        threshold=float(candidates[best]),
        coverage=float(numbers[best] / len(tested)),
        risk=float(errors[best] / numbers[best]),
        risk_bound=float(bounds[best]),
        target_risk=target_risk,
        delta=delta,
        calibration_examples=len(scores),
    )


def risk_bound(errors: ArrayLike, numbers: ArrayLike, delta: float) -> NDArray[np.float64]:
    """The Clopper–Pearson upper bound of a binomial rate at confidence 1 − delta; 1 without any examples."""
    k, n = np.asarray(errors), np.asarray(numbers)
    bound = beta.ppf(1 - delta, k + 1, np.maximum(n - k, 1))
    return np.where(k >= n, 1.0, bound)


def _candidates(pilot: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `MOST_CANDIDATES` different values of the pilot's finite uncertainties, ascending."""
    finite = pilot[np.isfinite(pilot)]
    if not len(finite):
        return finite
    shares = np.linspace(0, 1, min(len(finite), MOST_CANDIDATES))
    return np.unique(np.quantile(finite, shares, method="higher"))


def _errors(
    scores: NDArray[np.float64], right: NDArray[np.bool_], candidates: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of the examples at or below each candidate are wrong, and how many there are."""
    answered = scores[:, None] <= candidates
    return (answered & ~right[:, None]).sum(axis=0), answered.sum(axis=0)
