"""The cells of a sweep over alpha and the number of members, on the same held-out examples: figures, and which to take.

Read next: `choose`, the rule; `renyi.runs.grid`, which trains and measures the cells.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from renyi.evaluation import bootstrap
from renyi.evaluation.bootstrap import RESAMPLES, Estimate
from renyi.evaluation.metrics import calibration_error
from renyi.objectives import effective_members, renyi_loss, responsibilities


class Cell(NamedTuple):
    """A point of the grid. One member is the same at every alpha, so its alpha is 0."""

    members: int
    alpha: float

    def __str__(self) -> str:
        return "one adapter" if self.members == 1 else f"{self.members} members at alpha {self.alpha:g}"


class HeldOut(NamedTuple):
    """What the ensemble of one cell says about N held-out examples, in which it makes K predictions.

    Attributes:
        log_likelihood: float64 [M, N], nats.
        units: the units of each example, [N]: its trained tokens, or 1 if examples are pairs.
        weights: mixture weights [M].
        confidence: the mixture's probability of its likeliest next token, or of the better completion, [K].
        is_right: whether that prediction was right, [K].
    """

    log_likelihood: Tensor
    units: Tensor
    weights: Tensor
    confidence: Tensor
    is_right: Tensor


class CellQuality(NamedTuple):
    """How good a cell is on the held-out examples; nats a unit, which is a trained token or a pair.

    Responsibilities are taken at order 1 in all cells: the posterior over members given an example. At its own order a
    cell of alpha 0 would share every example evenly by definition.

    Attributes:
        mixture_nll: with a bootstrap interval over examples.
        behind: by how much it exceeds the best cell's, with an interval of paired draws of examples.
        standard_error: of `behind`; NaN for a single example.
        member_nll: mean over members, weighted.
        jensen_gap: `member_nll` − `mixture_nll`.
        effective_members: exp of the entropy of responsibilities, mean over examples, 1 to M.
        ece: expected calibration error of the likeliest prediction in 15 bins (Guo et al. 2017, arXiv 1706.04599).
        member_load: mean responsibility of each member, [M].
    """

    mixture_nll: Estimate
    behind: Estimate
    standard_error: float
    member_nll: float
    jensen_gap: float
    effective_members: float
    ece: float
    member_load: list[float]


class SweepEvaluation(NamedTuple):
    """What `evaluate_sweep` finds.

    Attributes:
        cells: by members, then alpha.
        best: the cell of smallest mixture NLL; among equal ones the cheapest.
        chosen: the cell to take, see `choose`.
        runner_up: the cell of smallest mixture NLL among all others; None if there is only one cell.
    """

    cells: dict[Cell, CellQuality]
    best: Cell
    chosen: Cell
    runner_up: Cell | None


def evaluate_sweep(cells: Mapping[Cell, HeldOut], resamples: int = RESAMPLES, seed: int = 0) -> SweepEvaluation:
    """Evaluate cells on the same examples, and choose one.

    Args:
        cells: at least one; examples are the same and in the same order in all of them.
        resamples: draws of examples for the intervals; 0 leaves them NaN.
        seed: of the draws.

    Raises:
        ValueError: the cells were measured on different examples.
    """
    ordered = dict(sorted(cells.items()))
    first = next(iter(ordered.values()))
    if any(not torch.equal(c.units, first.units) for c in ordered.values()):
        raise ValueError("the cells were measured on different examples")
    units_N = first.units.double().numpy()
    nll_N = {cell: renyi_loss(c.log_likelihood.double(), 1.0, _log_weights(c)).numpy() for cell, c in ordered.items()}
    best = min(ordered, key=lambda cell: nll_N[cell].sum())
    found = {
        cell: _quality(c, nll_N[cell], nll_N[cell] - nll_N[best], units_N, resamples, seed)
        for cell, c in ordered.items()
    }
    chosen = choose({cell: (q.behind.value, q.standard_error) for cell, q in found.items()})
    others = [cell for cell in found if cell != chosen]
    runner_up = min(others, key=lambda cell: found[cell].mixture_nll.value, default=None)
    return SweepEvaluation(found, best, chosen, runner_up)


def choose(behind: Mapping[Cell, tuple[float, float]]) -> Cell:
    """The cheapest cell that is at most one standard error behind the best.

    This is the rule of Breiman et al. (1984, Classification and Regression Trees, section 3.4.3). The standard error is
    that of the paired difference, because all cells share the difficulty of the examples. The cheapest cell has the
    fewest members, because training and answering cost in proportion to them. Among these it has the smallest alpha,
    because its members are better by themselves.

    Args:
        behind: for each cell, by how much its NLL exceeds the smallest, and the standard error of that.
    """
    return min(cell for cell, (difference, error) in behind.items() if difference == 0 or difference <= error)


def why(found: SweepEvaluation, unit: str) -> str:
    """The reason for the choice, in a sentence or two."""
    chosen, best, runner_up = found.chosen, found.best, found.runner_up
    smallest = f"the smallest mixture NLL, {found.cells[best].mixture_nll.value:.4f} nats a {unit}"
    if runner_up is None:
        return f"{chosen}: the only cell, with a mixture NLL of {found.cells[best].mixture_nll.value:.4f} nats a {unit}"
    if chosen != best:
        behind = found.cells[chosen]
        return (
            f"{chosen}: the fewest members, then the smallest alpha, within one standard error of {smallest}, which "
            f"{best} {'has' if best.members == 1 else 'have'}; it is {behind.behind.value:.4f} behind, with a standard "
            f"error of {behind.standard_error:.4f}"
        )
    cheaper = min(found.cells) != best
    behind = found.cells[runner_up]
    return (
        f"{chosen}: {smallest}"
        + (", and no cheaper cell is within one standard error of it" if cheaper else "")
        + f"; next best {'is' if runner_up.members == 1 else 'are'} {runner_up}, {_with_interval(behind.behind)} behind"
    )


def _with_interval(estimate: Estimate) -> str:
    value, low, high = estimate
    return f"{value:.4f}" if low != low else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _log_weights(cell: HeldOut) -> Tensor:
    return cell.weights.double().log()


def _quality(
    cell: HeldOut, nll_N: np.ndarray, behind_N: np.ndarray, units_N: np.ndarray, resamples: int, seed: int
) -> CellQuality:
    ell_MN, log_weights = cell.log_likelihood.double(), _log_weights(cell)
    r_MN = responsibilities(ell_MN, 1.0, log_weights)
    values = {name: float(x_N.sum() / units_N.sum()) for name, x_N in (("nll", nll_N), ("behind", behind_N))}
    statistics = {"nll": bootstrap.ratio(nll_N, units_N), "behind": bootstrap.ratio(behind_N, units_N)}
    estimates = bootstrap.intervals(values, statistics, len(units_N), resamples, seed)
    member_nll = float(renyi_loss(ell_MN, 0.0, log_weights).sum() / units_N.sum())
    return CellQuality(
        mixture_nll=estimates["nll"],
        behind=estimates["behind"],
        standard_error=ratio_standard_error(behind_N, units_N),
        member_nll=member_nll,
        jensen_gap=max(member_nll - values["nll"], 0.0),  # rounding could give less than 0
        effective_members=float(effective_members(r_MN).mean()),
        ece=calibration_error(cell.confidence, cell.is_right),
        member_load=r_MN.mean(dim=1).tolist(),
    )


def ratio_standard_error(numerator: ArrayLike, denominator: ArrayLike) -> float:
    """Standard error of Σ numerator / Σ denominator over N examples, by the delta method (Cochran 1977, ch. 6)."""
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    number, residual = len(above), above - above.sum() / below.sum() * below
    return float(np.sqrt(number / (number - 1) * np.square(residual).sum()) / below.sum()) if number > 1 else np.nan
