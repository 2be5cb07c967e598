"""Truths about the figures of probabilities and uncertainties: values by hand, closed forms, and scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from renyi.evaluation import bootstrap, metrics
from renyi.evaluation.metrics import Array

properties = settings(max_examples=60, deadline=None)

# ---- Probabilities ---------------------------------------------------------------------------------------------------

PROBS = [[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.0, 1.0, 0.0]]
LABELS = [0, 0, 2]


def test_values_by_hand() -> None:
    assert metrics.accuracy(PROBS, LABELS) == pytest.approx(1 / 3)
    assert metrics.nll(PROBS, [0, 0, 1]) == pytest.approx(-(np.log(0.7) + np.log(0.3)) / 3)
    assert metrics.nll([[0.0, 1.0]], [0]) == pytest.approx(-np.log(np.finfo(np.float64).tiny))  # and not infinity
    assert metrics.brier(PROBS, LABELS) == pytest.approx(((0.09 + 0.04 + 0.01) + (0.49 + 0.09 + 0.16) + 2) / 3)
    # Confidences 0.7 (right), 0.4 (wrong) and 1 (wrong) are each alone in a bin.
    assert metrics.ece(PROBS, LABELS) == pytest.approx((0.3 + 0.4 + 1) / 3)
    # In two bins of equal mass, the one of confidence 0.7 is shared: its excess −0.3 is split in halves.
    assert metrics.adaptive_ece(PROBS, LABELS, bins=2) == pytest.approx((abs(0.4 - 0.15) + abs(1 - 0.15)) / 3)
    assert metrics.adaptive_ece(PROBS, LABELS, bins=1) == pytest.approx(abs(0.4 - 0.3 + 1) / 3)


def test_reliability_is_what_ece_sums() -> None:
    generator = np.random.default_rng(0)
    probs = generator.dirichlet([1.0] * 4, size=200)
    labels = generator.integers(4, size=200)
    bins = metrics.reliability(probs, labels)
    assert sum(b.examples for b in bins) == 200
    assert sum(b.examples * abs(b.confidence - b.accuracy) for b in bins) / 200 == pytest.approx(
        metrics.ece(probs, labels)
    )
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    probs = [[p, 1 - p] for p in (0.9, 0.8, 0.6) for _ in range(10)]
    labels = [int(i >= right) for right in (9, 8, 6) for i in range(10)]
    assert metrics.ece(probs, labels) == pytest.approx(0, abs=1e-12)
    assert metrics.adaptive_ece(probs, labels, bins=3) == pytest.approx(0, abs=1e-12)
    assert metrics.adaptive_ece(probs[::-1], labels[::-1], bins=7) == pytest.approx(
        metrics.adaptive_ece(probs, labels, bins=7)
    )  # the order of equal confidences is no matter


# ---- Uncertainty against errors --------------------------------------------------------------------------------------


def test_risk_coverage_by_hand() -> None:
    """Errors at the second and at one of two equal last places."""
    curve = metrics.risk_coverage([0.1, 0.2, 0.7, 0.7], [0, 1, 0, 1])
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1.5 / 3, 2 / 4])
    assert metrics.aurc([0.1, 0.2, 0.7, 0.7], [0, 1, 0, 1]) == pytest.approx(1.5 / 4)
    assert metrics.accuracy_at_coverage([0.1, 0.2, 0.7, 0.7], [True, False, True, False], 0.5) == 0.5
    assert metrics.accuracy_at_coverage([0.1, 0.2, 0.7, 0.7], [True, False, True, False], 0.01) == 1
    assert metrics.accuracy_at_coverage(range(5), [True] * 4 + [False], 0.8) == 1


def test_what_tells_nothing_and_what_tells_all() -> None:
    wrong = np.array([0, 0, 0, 1, 1], bool)
    alike, oracle = np.zeros(5), wrong.astype(float)
    assert (metrics.auroc(alike, wrong), metrics.auroc(oracle, wrong)) == (0.5, 1)
    assert (metrics.aupr(alike, wrong), metrics.aupr(oracle, wrong)) == (0.4, 1)
    assert metrics.prr(alike, wrong) == pytest.approx(0, abs=1e-12)
    assert metrics.prr(oracle, wrong) == pytest.approx(1)
    assert metrics.prr(-oracle, wrong) == pytest.approx(-1)
    assert metrics.aurc(alike, wrong) == pytest.approx(0.4)
    assert metrics.aurc(oracle, wrong) == pytest.approx((1 / 4 + 2 / 5) / 5)
    for undefined in (metrics.auroc, metrics.aupr, metrics.prr):
        assert np.isnan(undefined(alike, np.ones(5, bool)))
        assert np.isnan(undefined(alike, np.zeros(5, bool)))


def test_prr_of_graded_losses() -> None:
    """Losses 0, 1, 3 rejected in the order 3, 0, 1, against the oracle's 3, 1, 0 and the diagonal."""
    area = (4 + 1) / 2 + (1 + 1) / 2 + (1 + 0) / 2
    oracle = (4 + 1) / 2 + (1 + 0) / 2
    assert metrics.prr([2.0, 1.0, 3.0], [0, 1, 3]) == pytest.approx((6 - area) / (6 - oracle))


levelled = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30)


@properties
@given(levelled)
def test_prr_of_errors_is_the_gini_coefficient(drawn: list[tuple[int, bool]]) -> None:
    score, wrong = np.array(drawn, float).T
    assert metrics.prr(score, wrong) == pytest.approx(2 * metrics.auroc(score, wrong) - 1, nan_ok=True)


# ---- Intervals -------------------------------------------------------------------------------------------------------


@properties
@given(levelled, st.integers(0, 10_000))
def test_statistics_of_draws_are_the_figures_of_the_drawn_examples(drawn: list[tuple[int, bool]], seed: int) -> None:
    """Each vectorised statistic, against its namesake on the repeated examples."""
    generator = np.random.default_rng(seed)
    score, wrong = np.array(drawn, float).T
    picked = generator.integers(len(score), size=len(score))
    ones, counts = np.ones((1, len(score))), np.bincount(picked, minlength=len(score))[None].astype(float)
    confidence = 0.5 + score / 8
    probs, labels = np.stack([confidence, 1 - confidence], axis=1), wrong.astype(int)

    def assert_alike(statistic: bootstrap.Statistic, whole: float, of_drawn: float) -> None:
        found = [float(statistic(c)[0]) for c in (ones, counts)]
        assert found == pytest.approx([whole, of_drawn], nan_ok=True, abs=1e-12)

    for name in ("auroc", "aupr", "prr", "aurc"):
        plain = getattr(metrics, name)
        assert_alike(getattr(bootstrap, name)(score, wrong), plain(score, wrong), plain(score[picked], wrong[picked]))
    for name in ("ece", "adaptive_ece"):
        plain = getattr(metrics, name)
        assert_alike(
            getattr(bootstrap, name)(probs, labels), plain(probs, labels), plain(probs[picked], labels[picked])
        )
    for coverage in (0.3, 0.8, 1.0):
        assert_alike(
            bootstrap.accuracy_at_coverage(score, wrong == 0, coverage),
            metrics.accuracy_at_coverage(score, wrong == 0, coverage),
            metrics.accuracy_at_coverage(score[picked], wrong[picked] == 0, coverage),
        )


def test_statistics_are_scikit_learns_with_weights() -> None:
    generator = np.random.default_rng(1)
    score, wrong = generator.normal(size=300).round(1), generator.random(300) < 0.3
    counts = generator.multinomial(300, np.full(300, 1 / 300), size=5).astype(float)
    for row, auroc, aupr in zip(
        counts, bootstrap.auroc(score, wrong)(counts), bootstrap.aupr(score, wrong)(counts), strict=True
    ):
        assert auroc == pytest.approx(roc_auc_score(wrong, score, sample_weight=row))
        assert aupr == pytest.approx(average_precision_score(wrong, score, sample_weight=row))


def interval(values: Array, **kwargs: int) -> bootstrap.Estimate:
    return bootstrap.intervals({"": values.mean()}, {"": bootstrap.mean(values)}, len(values), **kwargs)[""]


def test_the_interval_of_a_mean_is_the_central_limit_theorems() -> None:
    values = np.random.default_rng(2).normal(size=2000)
    found = interval(values, resamples=4000)
    error = 1.96 * values.std() / np.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.05 * error)
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_intervals_cover_the_truth() -> None:
    """Of 300 samples of 60 fair coins, about 95 % of the intervals hold one half."""
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(300):
        found = interval((generator.random(60) < 0.5).astype(float), resamples=200, seed=seed)
        held += found.low <= 0.5 <= found.high
    assert 0.90 < held / 300 < 0.99


def test_draws_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=50)
    whole = interval(values, resamples=100)
    monkeypatch.setattr(bootstrap, "_ENTRIES", 150)
    assert interval(values, resamples=100) == whole


def test_undefined_figures_have_no_interval() -> None:
    wrong = np.zeros(10, bool)
    found = bootstrap.intervals({"auroc": np.nan}, {"auroc": bootstrap.auroc(np.arange(10), wrong)}, 10)["auroc"]
    assert np.isnan(found).all()
    assert np.isnan(interval(np.ones(4), resamples=0).low)


# ---- Temperature -----------------------------------------------------------------------------------------------------


def test_temperature_undoes_what_sharpened() -> None:
    """Labels drawn from softmax(z): the best temperature of 3z is 3, of z / 2 it is 1/2."""
    generator = np.random.default_rng(5)
    logits = generator.normal(size=(20_000, 4)) * 1.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probs.cumsum(axis=1) < generator.random((20_000, 1))).sum(axis=1)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(1, rel=0.03)
    assert metrics.fit_temperature(3 * logits, labels) == pytest.approx(
        3 * metrics.fit_temperature(logits, labels), rel=1e-3
    )
    missing = np.concatenate([logits, np.full((20_000, 1), -np.inf)], axis=1)
    assert metrics.fit_temperature(missing, labels) == pytest.approx(metrics.fit_temperature(logits, labels), rel=1e-6)


def test_temperature_by_hand() -> None:
    """Two classes, logit 1 for the right one in 3 of 4 examples: σ(1/T) = 3/4."""
    found = metrics.fit_temperature([[1.0, 0.0]] * 4, [0, 0, 0, 1])
    assert found == pytest.approx(1 / np.log(3), rel=1e-4)
