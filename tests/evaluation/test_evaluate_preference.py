"""Truths about the evaluation of preferences: values computed by hand, and what must hold for any margins."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from renyi.evaluation import PreferenceEvaluation, evaluate_preference
from renyi.inference import PairScore

properties = settings(max_examples=60, deadline=None)

SURE = 800.0  # a margin that no float64 probability tells from certainty


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def entropy(p: float) -> float:
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def pairs(*margins: list[float]) -> list[PairScore]:
    """A score for each list of the members' margins; what is mixed from them is left empty."""
    nan = math.nan
    return [PairScore(i, 1, margin, nan, [], [], nan, nan, nan, nan) for i, margin in enumerate(margins)]


def evaluated(*margins: list[float], weights: list[float] | None = None, **kwargs: object) -> PreferenceEvaluation:
    members = len(margins[0])
    return evaluate_preference(pairs(*margins), torch.tensor(weights or [1 / members] * members), **kwargs)  # type: ignore[arg-type]


# ---- Values by hand --------------------------------------------------------------------------------------------------


def test_values_by_hand() -> None:
    """Two members, three pairs; probabilities of the chosen completion 0.9, 0.6, 0.2 and 0.7, 0.3, 0.2."""
    first, second = [0.9, 0.6, 0.2], [0.7, 0.3, 0.2]
    mixed = [0.8, 0.45, 0.2]
    found = evaluated(*([logit(p), logit(q)] for p, q in zip(first, second, strict=True)))
    assert found.pairs == 3
    for quality, p, accuracy in (
        (found.mixture, mixed, 1 / 3),
        (found.members[0], first, 2 / 3),
        (found.members[1], second, 1 / 3),
    ):
        assert quality.accuracy == pytest.approx(accuracy)
        assert quality.nll == pytest.approx(-sum(map(math.log, p)) / 3)
        assert quality.brier == pytest.approx(sum((1 - x) ** 2 for x in p) / 3)
    # Confidences 0.8 (right), 0.55 (wrong) and 0.8 (wrong): the first and the last are in one bin.
    assert found.mixture.ece == pytest.approx((2 * abs(0.5 - 0.8) + abs(0 - 0.55)) / 3)
    # 0.9, 0.6 and 0.8 are each alone.
    assert found.members[0].ece == pytest.approx((0.1 + 0.4 + 0.8) / 3)

    epistemic = [entropy(r) - (entropy(p) + entropy(q)) / 2 for p, q, r in zip(first, second, mixed, strict=True)]
    share = [e / entropy(r) for e, r in zip(epistemic, mixed, strict=True)]
    assert found.epistemic == pytest.approx(sum(epistemic) / 3)
    assert found.epistemic_share == pytest.approx(sum(share) / 3)
    assert found.most_contested == [1, 0, 2]


def test_a_calibrated_member_has_no_calibration_error() -> None:
    """In each bin, as many choices are as foreseen as the probability says."""
    calibrated: list[list[float]] = []
    for right, wrong in ((8, 2), (7, 3), (9, 1), (6, 4)):
        p = right / 10
        calibrated += [[logit(p)]] * right + [[-logit(p)]] * wrong
    found = evaluated(*calibrated)
    assert found.mixture.ece == pytest.approx(0, abs=1e-12)
    assert found.mixture == found.members[0]
    assert found.mixture.accuracy == pytest.approx(30 / 40)
    # Twice the margins are too sure of themselves; half are not sure enough, on the same pairs.
    for factor in (2.0, 0.5):
        other = evaluated(*([factor * margin[0]] for margin in calibrated)).mixture
        assert other.ece > 0.08
        assert other.nll > found.mixture.nll
        assert other.brier > found.mixture.brier
        assert other.accuracy == found.mixture.accuracy


def test_certainty_is_in_the_last_of_fifteen_bins() -> None:
    """Confidences 1 (wrong) and 0.95 (right) share a bin: its accuracy is 1/2, its confidence 0.975."""
    found = evaluated([-SURE], [logit(0.95)])
    assert found.mixture.ece == pytest.approx(0.975 - 0.5)


def test_opposite_sure_members() -> None:
    """A coin as a mixture, a bit of disagreement and nothing else, on every pair."""
    found = evaluated([SURE, -SURE], [-SURE, SURE])
    assert found.mixture.nll == pytest.approx(math.log(2))
    assert found.mixture.brier == pytest.approx(1 / 4)
    assert found.mixture.accuracy == 0  # a coin prefers nothing
    assert found.epistemic == pytest.approx(math.log(2))
    assert found.epistemic_share == pytest.approx(1)
    assert [m.accuracy for m in found.members] == [0.5, 0.5]
    assert [m.nll for m in found.members] == [SURE / 2, SURE / 2]  # and not infinity
    assert [m.brier for m in found.members] == [0.5, 0.5]
    assert [m.ece for m in found.members] == pytest.approx([0.5, 0.5])


def test_members_that_agree_are_their_mixture() -> None:
    found = evaluated(*([x] * 3 for x in (-2.0, 0.3, 5.0, SURE)), weights=[0.2, 0.3, 0.5])
    assert found.epistemic == found.epistemic_share == 0
    assert found.most_contested == [0, 1, 2, 3]  # none more than another: in the dataset's order
    for member in found.members:
        assert member == pytest.approx(found.mixture)


def test_weights_are_respected() -> None:
    margins = [[logit(0.9), logit(0.2)], [logit(0.6), logit(0.1)]]
    found = evaluated(*margins, weights=[0.75, 0.25])
    mixed = [0.75 * 0.9 + 0.25 * 0.2, 0.75 * 0.6 + 0.25 * 0.1]
    assert found.mixture.nll == pytest.approx(-sum(map(math.log, mixed)) / 2)
    assert found.mixture.accuracy == 0.5
    assert found.members == evaluated(*margins).members
    of_one = evaluated(*margins, weights=[1.0, 0.0])
    assert of_one.mixture == pytest.approx(found.members[0])
    assert of_one.epistemic == 0


def test_most_contested_names_rows_and_not_positions() -> None:
    scores = pairs([1.0, 1.0], [3.0, -3.0], [1.0, -1.0])
    moved = [score._replace(index=10 * score.index + 7) for score in scores]
    assert evaluate_preference(moved, torch.tensor([0.5, 0.5])).most_contested == [17, 27, 7]


# ---- Groups and contested pairs --------------------------------------------------------------------------------------


def test_groups() -> None:
    margins = [[1.0, 2.0], [-1.0, -1.0], [SURE, -SURE], [0.5, 0.5]]
    found = evaluated(*margins, groups=["b", "a", "a", "b"])
    assert found.groups is not None
    assert [(g.group, g.pairs, g.accuracy) for g in found.groups] == [("a", 2, 0.0), ("b", 2, 1.0)]
    assert found.groups[0].epistemic == pytest.approx(math.log(2) / 2)
    assert sum(g.pairs * g.epistemic for g in found.groups) == pytest.approx(4 * found.epistemic)
    with pytest.raises(ValueError, match="3 groups of 4 pairs"):
        evaluated(*margins, groups=["a", "b", "a"])


def test_contested_pairs_are_found_by_disagreement_and_not_by_doubt() -> None:
    """On contested pairs members contradict each other; on others both doubt, and the mixture doubts more."""
    contested = [[4.0, -1.0], [3.0, -1.0], [-3.0, 1.0]]
    doubtful = [[0.0, 0.0], [0.1, 0.05], [-0.02, 0.0]]
    found = evaluated(*contested, *doubtful, contested=[True] * 3 + [False] * 3).contested
    assert found is not None
    assert found == (3, 1.0, 1.0, 0.0)
    nobody_knows = evaluated(*[[1.0, 1.0]] * 4, contested=[1, 0, 0, 1]).contested
    assert nobody_knows == (2, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("value", [True, False])
def test_contested_pairs_need_others(value: bool) -> None:
    with pytest.raises(ValueError, match="all pairs are contested, or none"):
        evaluated([1.0], [2.0], contested=[value] * 2)


# ---- Properties ------------------------------------------------------------------------------------------------------

margins_of = st.floats(-60, 60) | st.sampled_from([0.0, 1e-12, SURE, -SURE, 1e5, -1e5])


@st.composite
def ensembles(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """Margins of some pairs, and weights of members."""
    members = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(margins_of, min_size=members, max_size=members), min_size=1, max_size=20))
    logs = torch.tensor(draw(st.lists(st.floats(-5, 5), min_size=members, max_size=members)))
    return rows, logs.softmax(0).tolist()


@properties
@given(ensembles())
def test_everything_is_in_its_range(drawn: tuple[list[list[float]], list[float]]) -> None:
    rows, weights = drawn
    found = evaluated(*rows, weights=weights)
    assert 0 <= found.epistemic_share <= 1
    assert 0 <= found.epistemic <= entropy_of(weights) + 1e-6  # weights are float32
    for quality in (found.mixture, *found.members):
        assert 0 <= quality.accuracy <= 1
        assert 0 <= quality.brier <= 1
        assert 0 <= quality.ece <= 1
        assert 0 <= quality.nll < math.inf
    assert sorted(found.most_contested) == list(range(len(rows)))


@properties
@given(ensembles())
def test_the_mixture_is_no_worse_than_the_mean_member(drawn: tuple[list[list[float]], list[float]]) -> None:
    """Jensen's inequality: −log and (1 − p)² are convex."""
    rows, weights = drawn
    found = evaluated(*rows, weights=weights)
    for score in ("nll", "brier"):
        mean = sum(w * getattr(m, score) for w, m in zip(weights, found.members, strict=True))
        assert getattr(found.mixture, score) <= mean * (1 + 1e-6) + 1e-12


def entropy_of(weights: list[float]) -> float:
    return -sum(w * math.log(w) for w in weights if w > 0)
