"""Percentile intervals of the figures in `metrics`, from resampling examples with replacement, all draws at once.

A draw says how often each of N examples was drawn: R draws are counts [R, N]. Each function here computes the figure of
the same name in `metrics` for every draw. Read next: `metrics.py`.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from renyi.evaluation import metrics
from renyi.evaluation.estimate import Estimate
from renyi.evaluation.metrics import Array

Statistic = Callable[[Array], Array]  # of counts [R, N], to [R]

RESAMPLES = 1000
LEVEL = 0.95
_ENTRIES = 2_000_000  # counts held at once


def intervals(
    values: dict[str, float], statistics: dict[str, Statistic], examples: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Percentile intervals of several figures of the same N examples, on the same draws.

    If a figure is undefined in a draw (AUROC without errors), that draw does not count. Calibration errors are biased
    upwards in small samples, and more in resamples, so their interval may lie above the value.

    Args:
        values: the figures on the examples as they are.
        statistics: the same figures as functions of counts, by the same names.
        examples: N.
        resamples: R; 0 leaves intervals NaN.
        seed: of the draws.
    """
    drawn: dict[str, list[Array]] = {name: [] for name in values}
    for counts in _draws(examples, resamples if examples > 1 else 0, seed):  # resampling one example gives no spread
        for name, found in drawn.items():
            found.append(statistics[name](counts))
    return {name: Estimate(value, *_percentiles(drawn[name])) for name, value in values.items()}


def _draws(examples: int, resamples: int, seed: int) -> Iterator[Array]:
    generator = np.random.default_rng(seed)
    block = max(1, _ENTRIES // examples)
    for start in range(0, resamples, block):
        number = min(block, resamples - start)
        drawn = generator.integers(examples, size=(number, examples))
        flat = (drawn + examples * np.arange(number)[:, None]).ravel()
        yield np.bincount(flat, minlength=number * examples).reshape(number, examples).astype(np.float64)


def _percentiles(blocks: list[Array]) -> tuple[float, float]:
    values = np.concatenate(blocks) if blocks else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# ---- Means and calibration -------------------------------------------------------------------------------------------


def mean(values: ArrayLike) -> Statistic:
    """The mean of values [N], such as accuracy, NLL and Brier score."""
    fixed = np.asarray(values, np.float64)
    return lambda counts: counts @ fixed / counts.sum(axis=1)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Statistic:
    """Σ numerator / Σ denominator, each [N], such as NLL per token."""
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return lambda counts: counts @ above / (counts @ below)


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = metrics.BINS) -> Statistic:
    confidence, right = metrics.confidence(probs), metrics.is_right(probs, labels)
    excess_NB = np.eye(bins)[metrics.equal_width_bin(confidence, bins)] * (confidence - right)[:, None]
    return lambda counts: np.abs(counts @ excess_NB).sum(axis=1) / counts.sum(axis=1)


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, bins: int = metrics.BINS) -> Statistic:
    confidence = metrics.confidence(probs)
    grouped = _Grouped(confidence, confidence - metrics.is_right(probs, labels))

    def statistic(counts: Array) -> Array:
        pairs = zip(*grouped.cumulated(counts), strict=True)
        return np.array([metrics.equal_mass_error(count, excess, bins) for count, excess in pairs])

    return statistic


# ---- Uncertainty against errors --------------------------------------------------------------------------------------


class _Grouped:
    """Examples by ascending uncertainty, equal ones in one level, and sums over them in every draw."""

    def __init__(self, by: ArrayLike, values: ArrayLike):
        self.starts, self.order = metrics.levels(by)
        self.values = np.asarray(values, np.float64)[self.order]

    def sums(self, counts: Array) -> tuple[Array, Array]:
        """Numbers of examples and sums of values at each level: [R, K] each."""
        ordered = counts[:, self.order]
        return np.add.reduceat(ordered, self.starts, axis=1), np.add.reduceat(
            ordered * self.values, self.starts, axis=1
        )

    def cumulated(self, counts: Array) -> tuple[Array, Array]:
        """The same up to each level, [R, K + 1] from 0."""
        numbers, values = (np.pad(x.cumsum(axis=1), ((0, 0), (1, 0))) for x in self.sums(counts))
        return numbers, values


def auroc(score: ArrayLike, positive: ArrayLike) -> Statistic:
    grouped = _Grouped(score, positive)

    def statistic(counts: Array) -> Array:
        numbers, positives = grouped.sums(counts)
        negatives = numbers - positives
        below = negatives.cumsum(axis=1) - negatives / 2  # a tie counts one half
        with np.errstate(invalid="ignore", divide="ignore"):
            return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))

    return statistic


def prr(score: ArrayLike, positive: ArrayLike) -> Statistic:
    """The prediction rejection ratio for losses 0 and 1. It equals 2 AUROC − 1 there."""
    of_auroc = auroc(score, positive)
    return lambda counts: 2 * of_auroc(counts) - 1


def aupr(score: ArrayLike, positive: ArrayLike) -> Statistic:
    grouped = _Grouped(-np.asarray(score, np.float64), positive)

    def statistic(counts: Array) -> Array:
        numbers, positives = grouped.sums(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = positives.cumsum(axis=1) / numbers.cumsum(axis=1)
            found = np.where(positives > 0, positives * precision, 0.0).sum(axis=1) / positives.sum(axis=1)
        return np.where(positives.sum(axis=1) == numbers.sum(axis=1), np.nan, found)

    return statistic


def aurc(uncertainty: ArrayLike, loss: ArrayLike) -> Statistic:
    grouped = _Grouped(uncertainty, loss)
    harmonic = np.append(0.0, (1 / np.arange(1, len(grouped.order) + 1)).cumsum())

    def statistic(counts: Array) -> Array:
        # With B examples of loss S before a level of n examples of mean loss l, the risks within it are
        # (S + l (j − B)) / j for j from B + 1 to B + n; Σ 1/j is a difference of harmonic numbers.
        numbers, losses = grouped.sums(counts)
        before, before_loss = numbers.cumsum(axis=1) - numbers, losses.cumsum(axis=1) - losses
        reciprocal = np.diff(harmonic[np.pad((before + numbers).astype(int), ((0, 0), (1, 0)))], axis=1)
        mean_loss = losses / np.maximum(numbers, 1)
        risks = (before_loss - mean_loss * before) * reciprocal + mean_loss * numbers
        return risks.sum(axis=1) / counts.sum(axis=1)

    return statistic


def accuracy_at_coverage(uncertainty: ArrayLike, correct: ArrayLike, coverage: float) -> Statistic:
    grouped = _Grouped(uncertainty, correct)

    def statistic(counts: Array) -> Array:
        answered = metrics.answered_at(coverage, int(counts[0].sum()))
        return np.array([np.interp(answered, n, r) for n, r in zip(*grouped.cumulated(counts), strict=True)]) / answered

    return statistic
