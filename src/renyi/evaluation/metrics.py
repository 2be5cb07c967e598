"""How good probabilities are, and how well an uncertainty finds the errors: figures of float64 arrays.

Read next: `bootstrap.py` (intervals of the same figures), `selective.py` (a threshold with a guarantee).
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import average_precision_score, roc_auc_score

Array = NDArray[np.float64]

BINS = 15
SMALLEST = float(np.finfo(np.float64).tiny)

# ---- Probabilities ---------------------------------------------------------------------------------------------------


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose label is the likeliest class; a tie goes to the first class.

    Args:
        probs: [N, C], rows sum to one. A class that an example does not have is given 0.
        labels: [N], from 0 to C − 1.
    """
    return float(is_right(probs, labels).mean())


def is_right(probs: ArrayLike, labels: ArrayLike) -> NDArray[np.bool_]:
    """Of each example, whether its label is the likeliest class: [N]."""
    return np.asarray(probs).argmax(axis=1) == np.asarray(labels)


def nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean −log p(label), nats an example; a label of probability 0 counts as the smallest float64."""
    return float(example_nll(probs, labels).mean())


def example_nll(probs: ArrayLike, labels: ArrayLike) -> Array:
    p, y = np.asarray(probs, np.float64), np.asarray(labels)
    return -np.log(np.maximum(p[np.arange(len(y)), y], SMALLEST))


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean Σ_c (p_c − 1[c = label])², from 0 to 2 (Brier 1950)."""
    return float(example_brier(probs, labels).mean())


def example_brier(probs: ArrayLike, labels: ArrayLike) -> Array:
    p, y = np.asarray(probs, np.float64), np.asarray(labels)
    return ((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1)


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of the likeliest class in bins of equal width, by torchmetrics.

    Σ_b n_b/N · |mean confidence − share right| (Guo et al. 2017, arXiv 1706.04599).
    """
    return calibration_error(confidence(probs), is_right(probs, labels), bins)


def calibration_error(confidence: ArrayLike, is_right: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of stated confidences [N] in bins of equal width, against what was right [N].

    A confidence of exactly 1 counts in the last bin. Torchmetrics would add a bin for it.
    """
    # Imported here because torchmetrics imports transformers, which takes seconds.
    from torchmetrics.functional.classification import binary_calibration_error

    sure = torch.as_tensor(confidence).double().clamp(max=1 - torch.finfo(torch.float64).eps)
    return float(binary_calibration_error(sure, torch.as_tensor(is_right).long(), n_bins=bins, norm="l1"))


def ece_by_group(probs: ArrayLike, labels: ArrayLike, groups: ArrayLike, bins: int = BINS) -> Array:
    """`ece` of each of G groups, in one pass: [G].

    Args:
        probs, labels: as for `ece`.
        groups: which group each example belongs to, [N], from 0 to G − 1; none is empty.
    """
    sure, right, group_N = confidence(probs), is_right(probs, labels), np.asarray(groups)
    at_N, number = group_N * bins + equal_width_bin(sure, bins), int(group_N.max()) + 1
    excess_GB = np.bincount(at_N, sure - right, minlength=number * bins).reshape(number, bins)
    return np.abs(excess_GB).sum(axis=1) / np.bincount(group_N)


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of the likeliest class in bins of equal mass (Nixon et al. 2019, arXiv 1904.01685).

    Every bin holds exactly N / bins examples in the order of their confidence, an example on an edge being shared;
    examples of equal confidence are spread evenly, so that their order is no matter.
    """
    sure = confidence(probs)
    return float(equal_mass_error(*_cumulated(sure, sure - is_right(probs, labels)), bins))


def equal_mass_error(count: Array, excess: Array, bins: int) -> Array:
    """Σ_b |excess in bin b| / N from cumulated counts and excess of confidence, both [K + 1], over equal masses."""
    edges = np.linspace(0.0, count[-1], bins + 1)
    return np.abs(np.diff(np.interp(edges, count, excess))).sum() / count[-1]


class ReliabilityBin(NamedTuple):
    """A bin of examples by confidence: how many, their mean confidence, and the share that is right."""

    examples: int
    confidence: float
    accuracy: float


def reliability(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[ReliabilityBin]:
    """The bins of `ece` that hold anything, from unsure to sure."""
    sure, right = confidence(probs), is_right(probs, labels)
    bin_of = equal_width_bin(sure, bins)
    return [
        ReliabilityBin(int(here.sum()), float(sure[here].mean()), float(right[here].mean()))
        for here in (bin_of == b for b in range(bins))
        if here.any()
    ]


def equal_width_bin(sure: Array, bins: int) -> NDArray[np.int64]:
    """Of each confidence, the bin that torchmetrics puts it in: a value on an edge belongs to the bin above."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return torch.bucketize(torch.from_numpy(sure), edges, right=True).numpy() - 1


def confidence(probs: ArrayLike) -> Array:
    """max_c p_c, [N]; a confidence of 1 would fall on the last edge, where torchmetrics opens a bin of its own."""
    return np.minimum(np.asarray(probs, np.float64).max(axis=1), 1 - np.finfo(np.float64).eps)


# ---- Uncertainty against errors --------------------------------------------------------------------------------------


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """How well a score ranks positives above the others, by scikit-learn: 1/2 for not at all; NaN if all are alike.

    Args:
        score: [N]; higher is more uncertain.
        positive: [N] bool: errors, or examples out of distribution.
    """
    is_positive = np.asarray(positive, bool)
    return (
        np.nan if is_positive.all() or not is_positive.any() else float(roc_auc_score(is_positive, np.asarray(score)))
    )


def aupr(score: ArrayLike, positive: ArrayLike) -> float:
    """Average precision of a score in finding positives, by scikit-learn; chance is their share. NaN if all alike."""
    is_positive = np.asarray(positive, bool)
    if is_positive.all() or not is_positive.any():
        return np.nan
    return float(average_precision_score(is_positive, np.asarray(score)))


class RiskCoverage(NamedTuple):
    """Of each number of most certain examples answered: their share of all [N], and their mean loss [N]."""

    coverage: Array
    risk: Array


def risk_coverage(uncertainty: ArrayLike, loss: ArrayLike) -> RiskCoverage:
    """The risk–coverage curve (Geifman and El-Yaniv 2017, arXiv 1705.08500).

    Examples of equal uncertainty are answered in random order, and the risk is the expected one.

    Args:
        uncertainty: [N].
        loss: of answering, [N]: usually 1 for an error and 0 otherwise.
    """
    count, cumulated = _cumulated(np.asarray(uncertainty, np.float64), np.asarray(loss, np.float64))
    answered = np.arange(1, int(count[-1]) + 1, dtype=np.float64)
    return RiskCoverage(answered / count[-1], np.interp(answered, count, cumulated) / answered)


def aurc(uncertainty: ArrayLike, loss: ArrayLike) -> float:
    """Area under the risk–coverage curve: its mean risk over the N coverages; lower is better."""
    return float(risk_coverage(uncertainty, loss).risk.mean())


def prr(uncertainty: ArrayLike, loss: ArrayLike) -> float:
    """Prediction rejection ratio: how much of what an oracle gains over random rejection the uncertainty gains.

    The loss left, as the most uncertain examples are handed over one by one, is a curve; with areas A under it,
    PRR = (A_random − A) / (A_random − A_oracle): 1 for an uncertainty that ranks by the loss itself, 0 for a random
    one, negative for a misleading one. For losses of 0 and 1 it is 2 AUROC − 1. Source: Malinin and Gales 2021, arXiv
    2002.07650. NaN where all losses are alike.
    """
    losses = np.asarray(loss, np.float64)
    if np.ptp(losses) == 0:
        return np.nan
    area, oracle = _area_left(np.asarray(uncertainty, np.float64), losses), _area_left(losses, losses)
    random = losses.sum() * len(losses) / 2
    return float((random - area) / (random - oracle))


def _area_left(uncertainty: Array, loss: Array) -> float:
    count, cumulated = _cumulated(uncertainty, loss)
    return float(np.trapezoid(cumulated, count))


def accuracy_at_coverage(uncertainty: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Share right of the ⌈coverage · N⌉ most certain examples."""
    risk = risk_coverage(uncertainty, ~np.asarray(correct, bool)).risk
    return float(1 - risk[answered_at(coverage, len(risk)) - 1])


def answered_at(coverage: float, examples: int) -> int:
    """⌈coverage · N⌉, at least one; 0.8 · 5 is 4 however it is rounded."""
    return min(examples, max(1, int(np.ceil(coverage * examples - 1e-9))))


def _cumulated(by: Array, values: Array) -> tuple[Array, Array]:
    """Cumulated counts and sums of values, [K + 1] from 0, over the K different levels of `by`, ascending."""
    starts, order = levels(by)
    count = np.append(starts, len(by)).astype(np.float64)
    return count, np.append(0.0, np.add.reduceat(values[order], starts).cumsum())


def levels(by: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each of the K different levels of `by` starts, [K], in its ascending order [N]."""
    values = np.asarray(by, np.float64)
    order = values.argsort(kind="stable")
    ascending = values[order]
    return np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])), order


# ---- Temperature -----------------------------------------------------------------------------------------------------


def fit_temperature(scores: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T from 1/100 to 100 at which softmax(scores / T) has the least NLL (Guo et al. 2017).

    Args:
        scores: [N, C] log-probabilities or logits; −inf for a class that an example does not have.
        labels: [N].
    """
    logits, y = np.asarray(scores, np.float64), np.asarray(labels)

    def loss(log_temperature: float) -> float:  # convex in 1/T, so it has a single minimum also in log T
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(y)), y].mean())

    bound = np.log(100.0)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}).x))


def cross_fitted_temperatures(scores: ArrayLike, labels: ArrayLike, seed: int = 0) -> Array:
    """Of each of N ≥ 2 examples the temperature that is fitted on the half that it is not in: [N].

    So no example has to be set aside, and none has a temperature that knows its label.

    Args:
        scores, labels: as for `fit_temperature`.
        seed: of the halves.
    """
    logits, y = np.asarray(scores, np.float64), np.asarray(labels)
    half_N = np.random.default_rng(seed).permutation(len(y)) % 2
    fitted = [fit_temperature(logits[half_N != half], y[half_N != half]) for half in (0, 1)]
    return np.array(fitted)[half_N]
