"""The evaluation of thumbs: values by hand, and temperatures that know nothing of the rows that they are for."""

import math

import numpy as np
import pytest
import torch

from renyi.evaluation.choice_quality import Opinion
from renyi.evaluation.metrics import cross_fitted_temperatures, fit_temperature
from renyi.evaluation.thumb_quality import evaluate_thumbs


def opinion(*up: list[float]) -> Opinion:
    """Of members with these probabilities of thumbs up, with equal weights."""
    p = torch.tensor(up, dtype=torch.float64)
    return Opinion(torch.stack([1 - p, p], dim=-1).log(), torch.full((len(up),), 1 / len(up)))


def test_values_by_hand() -> None:
    first, second = [0.9, 0.4, 0.5, 0.3], [0.7, 0.2, 0.1, 0.1]
    mixed, is_up = [0.8, 0.3, 0.3, 0.2], [True, True, False, False]
    found = evaluate_thumbs(opinion(first, second), is_up, baselines={"one": opinion(second)}, resamples=0)
    assert found.up == 0.5
    systems = {s.name: s for s in found.figures.systems}
    assert list(systems) == ["mixture", "member 0", "member 1", "one", "one, temperature", "mixture, temperature"]
    right = [p if up else 1 - p for p, up in zip(mixed, is_up, strict=True)]
    assert systems["mixture"].accuracy.value == 0.75
    assert systems["mixture"].nll.value == pytest.approx(-sum(map(math.log, right)) / 4)
    assert systems["mixture"].brier.value == pytest.approx(sum((1 - p) ** 2 for p in right) / 4)
    # Of four pairs of a thumb up and a thumb down, 0.3 against 0.3 is a tie.
    assert found.auroc["mixture"].value == pytest.approx(3.5 / 4)
    assert found.auroc["member 0"].value == pytest.approx(3 / 4)
    assert found.auroc["member 1"].value == found.auroc["one"].value == 1
    assert "one, temperature" not in found.auroc
    assert systems["one"].nll == systems["member 1"].nll


def test_thumbs_of_one_kind_have_no_auroc() -> None:
    found = evaluate_thumbs(opinion([0.9, 0.4]), [True, True], resamples=10)
    assert math.isnan(found.auroc["mixture"].value)
    assert found.figures.systems[0].accuracy.value == 0.5


def test_the_temperature_of_a_row_is_fitted_on_other_rows() -> None:
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(40, 2))
    labels = (scores[:, 1] + draw.normal(size=40) > scores[:, 0]).astype(int)
    before = cross_fitted_temperatures(scores, labels)
    assert len(set(before)) == 2
    for row in range(6):
        other = labels.copy()
        other[row] = 1 - other[row]
        same = cross_fitted_temperatures(scores, other) == before
        assert same.sum() == 20
        assert same[row]


def test_scores_that_are_three_times_too_sure_get_a_temperature_of_three() -> None:
    draw = np.random.default_rng(1)
    logit = draw.normal(size=8000)
    labels = (draw.random(8000) < 1 / (1 + np.exp(-logit))).astype(int)
    scores = 3 * np.stack([np.zeros(8000), logit], axis=1)
    assert cross_fitted_temperatures(scores, labels) == pytest.approx(3, rel=0.1)
    assert fit_temperature(scores, labels) == pytest.approx(3, rel=0.07)
