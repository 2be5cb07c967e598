"""The alpha schedule: 0 while holding, then a straight line, then alpha."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renyi.training.schedule import scheduled_alpha

shares = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.199, 0.0), (0.2, 0.0), (0.25, 0.2), (0.3, 0.4), (0.4, 0.8), (1.0, 0.8)]
)
def test_hold_then_ramp_then_stay(progress, expected):
    assert scheduled_alpha(progress, 0.8, 0.2, 0.2) == pytest.approx(expected)


def test_without_hold_and_ramp_alpha_is_there_from_the_first_step():
    assert scheduled_alpha(0.0, 0.8, 0.0, 0.0) == 0.8


def test_a_hold_without_a_ramp_is_a_jump():
    assert [scheduled_alpha(p / 10, 1.0, 0.5, 0.0) for p in (0, 4, 5, 10)] == [0, 0, 1, 1]


def test_a_ramp_may_last_to_the_end():
    assert scheduled_alpha(0.95, 0.8, 0.9, 0.1) == pytest.approx(0.4)
    assert scheduled_alpha(1.0, 0.8, 0.9, 0.1) == 0.8


@given(progress=shares, later=shares, alpha=shares, hold=shares, ramp=shares)
def test_it_stays_between_its_ends_and_never_falls(progress, later, alpha, hold, ramp):
    first, second = sorted((progress, later))
    one, two = (scheduled_alpha(p, alpha, hold, ramp * (1 - hold)) for p in (first, second))
    assert 0 <= one <= 1  # what `renyi_loss` accepts, to the last bit
    assert one <= two + 1e-12
    assert two <= alpha + 1e-12
    assert one == 0 or first >= hold
