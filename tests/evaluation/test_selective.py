"""The threshold for a wanted risk keeps its promise: by simulation, and by the binomial tail itself."""

import numpy as np
import pytest
from scipy.stats import binom

from renyi.evaluation.selective import risk_bound, risk_threshold


def test_the_bound_is_the_binomial_tails() -> None:
    """At its upper bound, so few errors or fewer have probability delta."""
    for errors, number in ((0, 10), (3, 50), (49, 50)):
        bound = float(risk_bound(errors, number, 0.1))
        assert binom.cdf(errors, number, bound) == pytest.approx(0.1)
    assert risk_bound(0, 44, 0.1) == pytest.approx(1 - 0.1 ** (1 / 44))
    assert (risk_bound(0, 0, 0.1), risk_bound(7, 7, 0.1)) == (1, 1)


def true_risk(threshold: float) -> float:
    """P(wrong | u ≤ t) of uniform u and P(wrong | u) = u / 2."""
    return min(threshold, 1) / 4


def draw(generator: np.random.Generator, number: int, decimals: int = 9) -> tuple[np.ndarray, np.ndarray]:
    uncertainty = generator.random(number)
    return uncertainty.round(decimals), generator.random(number) >= uncertainty / 2


def test_the_promise_is_kept() -> None:
    """Over 600 calibration sets the risk is too high in at most delta of them; and thresholds are of use."""
    generator = np.random.default_rng(0)
    target, delta, runs = 0.1, 0.2, 600
    found = [risk_threshold(*draw(generator, 2000), target, delta, seed) for seed in range(runs)]
    broken = [f is not None and true_risk(f.threshold) > target for f in found]
    assert np.mean(broken) <= delta + 3 * np.sqrt(delta * (1 - delta) / runs)
    thresholds = [f.threshold for f in found if f is not None]
    assert len(thresholds) > 0.9 * runs
    assert 0.2 < np.median(thresholds) < 0.4  # 0.4 is the best that is allowed


def test_the_promise_is_kept_where_every_threshold_breaks_it() -> None:
    """An uncertainty that tells nothing, and a risk just above the target: nearly always None, ties or not."""
    generator = np.random.default_rng(1)
    for levels in (3, 10**9):
        false = 0
        for seed in range(600):
            uncertainty = generator.integers(levels, size=300) / levels
            false += risk_threshold(uncertainty, generator.random(300) >= 0.11, 0.1, 0.1, seed) is not None
        assert false / 600 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 600)


def test_what_is_returned_describes_the_threshold() -> None:
    generator = np.random.default_rng(2)
    uncertainty, correct = draw(generator, 5000)
    found = risk_threshold(uncertainty, correct, 0.1)
    assert found is not None
    assert found.risk <= found.risk_bound <= 0.1
    assert found.coverage == pytest.approx(found.threshold, abs=0.03)
    assert found.risk == pytest.approx(true_risk(found.threshold), abs=0.02)
    assert (found.target_risk, found.delta, found.calibration_examples) == (0.1, 0.1, 5000)
    assert found == risk_threshold(uncertainty, correct, 0.1)
    stricter = risk_threshold(uncertainty, correct, 0.1, delta=0.001)
    assert stricter is not None
    assert stricter.threshold < found.threshold


def test_more_is_answered_of_a_better_model_and_all_of_a_perfect_one() -> None:
    uncertainty = np.random.default_rng(3).random(500)
    perfect = risk_threshold(uncertainty, np.ones(500, bool), 0.05)
    assert perfect is not None
    assert perfect.coverage > 0.95


def test_there_may_be_none() -> None:
    assert risk_threshold([], [], 0.1) is None
    assert risk_threshold([0.1] * 30, [True] * 30, 0.05) is None  # too few to promise anything
    assert risk_threshold(np.arange(500), np.zeros(500, bool), 0.5) is None
    assert risk_threshold(np.full(500, np.inf), np.ones(500, bool), 0.5) is None


@pytest.mark.parametrize("wrong", [{"target_risk": 0}, {"target_risk": 1}, {"delta": 0}, {"delta": 1.5}])
def test_ranges(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        risk_threshold([1, 2], [True, False], **{"target_risk": 0.1, **wrong})
    with pytest.raises(ValueError, match="pair of vectors"):
        risk_threshold([1, 2], [True], 0.1)
