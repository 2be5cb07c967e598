"""Measures of votes: values by hand, and what must hold for any members."""

import math

import pytest
import torch

from renyi.evaluation.vote_quality import evaluate_votes
from renyi.inference import PairScore

NAN = math.nan
EVEN = torch.tensor([0.5, 0.5])


def pair(index: int, votes: tuple[int, int, int], *chosen: float) -> PairScore:
    """A pair that each member prefers as it is with the given probability."""
    margin = [math.log(p) - math.log1p(-p) for p in chosen]
    return PairScore(index, 1, margin, NAN, [], [], NAN, NAN, NAN, NAN, votes=votes)


def test_values_by_hand():
    scores = [pair(0, (2, 1, 0), 0.9, 0.2), pair(1, (0, 3, 0), 0.3, 0.1)]
    found = evaluate_votes(scores, EVEN)
    first = 0.5 * 0.9**2 * 0.1 + 0.5 * 0.2**2 * 0.8
    second = 0.5 * 0.7**3 + 0.5 * 0.9**3
    assert found.nll_together == pytest.approx(-(math.log(first) + math.log(second)) / 6)
    assert found.nll == pytest.approx(-(2 * math.log(0.55) + math.log(0.45) + 3 * math.log(0.8)) / 6)
    assert found.accuracy == 1.0
    assert found.calibration == pytest.approx(((0.5 - 2 / 3) ** 2 + 0.0) / 2)
    assert found.probability_calibration == pytest.approx(((0.55 - 2 / 3) ** 2 + 0.2**2) / 2)
    assert found.split_auroc == 1.0  # members differ most on the split pair
    held_out = [
        2 * math.log(first / (0.5 * 0.9 * 0.1 + 0.5 * 0.2 * 0.8)),
        math.log(first / (0.5 * 0.9**2 + 0.5 * 0.2**2)),
    ]
    held_out.append(3 * math.log(second / (0.5 * 0.7**2 + 0.5 * 0.9**2)))
    assert found.nll_held_out == pytest.approx(-sum(held_out) / 6)
    assert [(b.pairs, pytest.approx(b.predicted)) for b in found.share_bins] == [(1, 0.2), (1, 0.55)]


def test_members_that_are_the_annotators_are_calibrated():
    scores = [pair(i, (1, 1, 0) if i % 2 else (2, 0, 0), 0.99, 0.01 if i % 2 else 0.99) for i in range(6)]
    found = evaluate_votes(scores, EVEN)
    assert found.calibration == 0
    assert found.split_auroc == 1.0
    one = evaluate_votes([s._replace(margin=s.margin[:1]) for s in scores], torch.ones(1))
    assert one.split_auroc is None
    assert one.nll_held_out == pytest.approx(one.nll)  # one member learns nothing from the other labels
    assert one.nll_together == pytest.approx(one.nll)
    assert found.nll < one.nll
    assert found.nll_held_out > found.nll_together > found.nll  # split labels of one pair are not of one member


def test_a_tie_is_half_of_either_and_a_label_where_the_model_knows_ties():
    scores = [pair(0, (0, 0, 2), 0.5, 0.5)]
    assert evaluate_votes(scores, EVEN).calibration == 0
    with_ties = evaluate_votes(scores, EVEN, tie_strength=2.0)
    assert with_ties.nll == pytest.approx(math.log(2))  # 2 / (1 + 1 + 2)
    with pytest.raises(ValueError, match="no votes"):
        evaluate_votes([pair(0, (1, 0, 0), 0.5)._replace(votes=None)], torch.ones(1))
