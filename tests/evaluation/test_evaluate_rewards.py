"""The evaluation of rewards: values by hand."""

import math

import pytest

from renyi.evaluation.reward_quality import evaluate_rewards

BETTER = [[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
WORSE = [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]]
DOUBT = [0.3, 0.0, 0.2], [0.5, 0.4, 0.6]


def test_values_by_hand() -> None:
    """Means 1 and ½, 1 and 0, ½ and 1; standard deviations 1 and 0, 0 and 0, ½ and 0."""
    found = evaluate_rewards(BETTER, WORSE, [0.5, 0.5], *DOUBT, [False, False, True], resamples=0)
    assert {name: e.value for name, e in found.accuracy.items()} == pytest.approx(
        {"mean": 2 / 3, "lcb": 1 / 3, "worst": 1 / 3}
    )
    assert found.lcb_gain.value == pytest.approx(-1 / 3)
    assert found.spread == pytest.approx(1.5 / 6)
    assert found.margin_spread == pytest.approx((1 + 0 + 0.5) / 3)
    # The third pair is ordered wrongly, and annotators split on it: spreads 1, 0, ½; mean margins of size ½, 1, ½.
    expected = {"margin_spread": 0.5, "epistemic": 0.5, "total": 1.0, "small_margin": 0.75}
    assert found.finds_wrong == found.finds_split == pytest.approx(expected)
    assert found.spread_and_epistemic == pytest.approx(1)
    narrow = evaluate_rewards(BETTER, WORSE, [0.5, 0.5], *DOUBT, lcb_width=0.25, resamples=0)
    assert narrow.accuracy["lcb"] == narrow.accuracy["mean"]
    assert narrow.finds_split is None


def test_a_member_without_weight_says_nothing() -> None:
    alone = evaluate_rewards([[x] for x, _ in BETTER], [[x] for x, _ in WORSE], [1.0], *DOUBT, resamples=20)
    found = evaluate_rewards(BETTER, WORSE, [1.0, 0.0], *DOUBT, resamples=20)
    assert found.accuracy == alone.accuracy
    assert (found.spread, found.margin_spread) == (0, 0)
    assert math.isnan(found.spread_and_epistemic)


def test_equal_rewards_count_half() -> None:
    found = evaluate_rewards([[1.0]], [[1.0]], [1.0], [0.0], [0.7], resamples=5)
    assert found.accuracy["mean"].value == 0.5
    assert math.isnan(found.finds_wrong["total"])
