"""Which answers belong to another prompt: a known mixture is told apart, and gains that tell nothing are left alone."""

import numpy as np
import pytest

from renyi.audit.mismatch import MOST, gains_of


def drawn(n: int, errors: int, gain: float, number: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Answers that gain `gain` nats from their prompts, but for the first `errors`. The noise is 1 nat."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-50, 20, n)
    own = base + gain * (np.arange(n) >= errors) + rng.normal(size=n)
    return own, base + rng.normal(size=(number, n))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_what_mismatched_answers_gain_is_told_from_wrong_prompts_alone(number: int) -> None:
    """Differences of two wrong prompts have the distribution of mismatched answers' gains, so ranks are uniform."""
    gains = gains_of(*drawn(4000, 4000, 0.0, number))
    np.testing.assert_allclose(np.quantile(gains.rank, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_swapped_answers_are_found_and_no_others(seed: int) -> None:
    gains = gains_of(*drawn(240, 20, 12.0, seed=seed))
    found = np.flatnonzero(gains.is_mismatched)
    assert set(found) <= set(range(20))
    assert len(found) >= 15  # nine in ten on average
    assert not gains_of(*drawn(240, 0, 12.0, seed=seed)).is_mismatched.any()


def test_gains_that_are_small_anyway_call_only_what_other_prompts_make_likelier() -> None:
    gains = gains_of(*drawn(1000, 0, 1.8))
    assert gains.limit == 0
    assert not gains.is_mismatched[gains.nats > 0].any()
    assert np.mean(gains_of(*drawn(1000, 0, 2.5)).is_mismatched) <= MOST


@pytest.mark.parametrize("gain", [0.0, 0.7])
def test_nothing_is_called_where_prompts_say_little_about_answers(gain: float) -> None:
    """References of verses, for example, which a model has not learned by heart: half of the answers gain nothing."""
    assert not gains_of(*drawn(1000, 0, gain)).is_mismatched.any()


def test_an_answer_without_rivals_is_not_called() -> None:
    own, rivals = drawn(50, 5, 12.0)
    rivals[0, 3] = rivals[1, 7] = np.nan
    gains = gains_of(own, rivals)
    assert not gains.is_mismatched[[3, 7]].any()
    assert gains.rank[3] == gains.rank[7] == 1
    assert gains.is_mismatched[[0, 1, 2, 4]].sum() >= 3
    assert not gains_of(own, np.full((2, 50), np.nan)).is_mismatched.any()
