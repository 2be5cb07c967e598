"""Truths about the evaluation of multiple choice and of text: values by hand, and what must hold for any members."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from renyi.evaluation import (
    Opinion,
    calibration_split,
    evaluate_choice,
    evaluate_perplexity,
    metrics,
    specialisation,
)
from renyi.inference import Score


def opinion(*members: list[list[float]], weights: list[float] | None = None) -> Opinion:
    weights = weights or [1 / len(members)] * len(members)
    return Opinion(torch.tensor(members, dtype=torch.float64).log(), torch.tensor(weights))


def drawn(members: int, questions: int, options: int = 4, seed: int = 0, scale: float = 1.0) -> Opinion:
    logits = scale * torch.randn(members, questions, options, generator=torch.Generator().manual_seed(seed))
    return Opinion(logits.double().log_softmax(-1), torch.full((members,), 1 / members))


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


# ---- Choice ----------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_option_taken():
    ell = torch.tensor([[[-2.0, -6.0]], [[-4.0, -9.0]]], dtype=torch.float64)
    weights, tokens = torch.tensor([0.25, 0.75]), torch.tensor([[2, 3]])
    found = Opinion(ell.log_softmax(-1), weights, ell, tokens).uncertainty()["perplexity"]
    likelihood = 0.25 * math.exp(-2) + 0.75 * math.exp(-4)
    assert found.tolist() == pytest.approx([likelihood ** (-1 / 2)])
    assert "perplexity" not in Opinion(ell.log_softmax(-1), weights).uncertainty()


def test_values_by_hand() -> None:
    """Two members, three questions of two options; the mixture has 0.8, 0.45 and 0.2 for the first, which is right."""
    found = evaluate_choice(
        opinion([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [[0.7, 0.3], [0.3, 0.7], [0.2, 0.8]]), [0, 0, 0], resamples=0
    )
    mixture, first, second = found.systems
    assert [s.name for s in found.systems] == ["mixture", "member 0", "member 1"]
    assert (found.questions, found.calibration_questions) == (3, 0)
    assert mixture.accuracy.value == pytest.approx(1 / 3)
    assert first.accuracy.value == pytest.approx(2 / 3)
    assert mixture.nll.value == pytest.approx(-sum(map(math.log, (0.8, 0.45, 0.2))) / 3)
    assert second.brier.value == pytest.approx(2 * sum((1 - p) ** 2 for p in (0.7, 0.3, 0.2)) / 3)
    # The right answer is as sure (0.8) as the last wrong one; the other wrong one is the least sure.
    assert mixture.detection["max_probability"].auroc.value == pytest.approx(3 / 4)
    # Members disagree on the first question a little, on the second much, on the last not at all.
    assert mixture.detection["epistemic"].auroc.value == pytest.approx(1 / 2)
    assert found.most_contested == [1, 0, 2]
    assert set(first.detection) == {"max_probability", "total"}
    assert mixture.risk["total"] == pytest.approx([1 / 2, 1 / 2, 2 / 3])
    assert math.isnan(mixture.accuracy.low)


def test_uncertainty_is_that_of_the_choice() -> None:
    scores = opinion([[0.9, 0.1]], [[0.5, 0.5]])
    found = scores.uncertainty()
    assert found["total"][0] == pytest.approx(entropy(0.7, 0.3))
    assert found["aleatoric"][0] == pytest.approx((entropy(0.9, 0.1) + entropy(0.5, 0.5)) / 2)
    assert found["epistemic"][0] == pytest.approx(found["total"][0] - found["aleatoric"][0])
    assert found["max_probability"][0] == pytest.approx(0.3)


def test_options_that_are_not_there_change_nothing() -> None:
    plain = drawn(3, 40, 3)
    padded = Opinion(torch.cat([plain.log_probs, torch.full((3, 40, 2), -torch.inf)], dim=-1), plain.weights)
    labels = [i % 3 for i in range(40)]
    assert_same(evaluate_choice(plain, labels, resamples=20), evaluate_choice(padded, labels, resamples=20))


def assert_same(one: object, other: object) -> None:
    if isinstance(one, tuple | list):
        assert len(one) == len(other)  # type: ignore[arg-type]
        for a, b in zip(one, other, strict=True):  # type: ignore[call-overload]
            assert_same(a, b)
    elif isinstance(one, dict):
        assert_same(list(one.items()), list(other.items()))  # type: ignore[attr-defined]
    elif isinstance(one, float):
        assert one == pytest.approx(other, nan_ok=True, abs=1e-9)
    else:
        assert one == other


def test_members_that_agree_are_their_mixture() -> None:
    one = drawn(1, 60)
    found = evaluate_choice(Opinion(one.log_probs.repeat(3, 1, 1), torch.full((3,), 1 / 3)), [0] * 60, resamples=50)
    for member in found.systems[1:]:
        assert_same(member[1:6], found.systems[0][1:6])
    assert found.most_contested == list(range(60))


def test_baselines_are_evaluated_on_the_same_questions() -> None:
    ensemble, other = drawn(2, 50, seed=1), drawn(1, 50, seed=2)
    labels = [i % 4 for i in range(50)]
    aside, kept = calibration_split(50, 0.3)
    found = evaluate_choice(ensemble, labels, baselines={"single": other}, calibration=aside, resamples=30)
    names = ["mixture", "member 0", "member 1", "single", "single, temperature", "mixture, temperature"]
    assert [s.name for s in found.systems] == names
    assert (found.questions, found.calibration_questions) == (35, 15)
    alone = evaluate_choice(other.rows(kept), [labels[i] for i in kept], resamples=30)
    assert_same(found.systems[3][1:], alone.systems[0][1:])
    assert set(found.most_contested) == set(kept.tolist())
    with pytest.raises(ValueError, match="50 labels of 40 questions of x"):
        evaluate_choice(ensemble, labels, baselines={"x": drawn(1, 40)})


def test_a_temperature_mends_overconfidence_and_keeps_accuracy() -> None:
    truth = drawn(1, 4000, scale=1.5)
    labels = torch.multinomial(truth.log_probs[0].exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0].tolist()
    sharp = Opinion((3 * truth.log_probs).log_softmax(-1), truth.weights)
    aside, _ = calibration_split(4000, 0.5)
    found = evaluate_choice(sharp, labels, calibration=aside, resamples=0)
    before, after = found.systems
    assert after.name == "member 0, temperature"
    assert after.temperature == pytest.approx(3, rel=0.1)
    assert after.accuracy == pytest.approx(before.accuracy, nan_ok=True)
    assert after.ece.value < 0.03 < 0.1 < before.ece.value
    assert after.nll.value < before.nll.value


def test_the_temperature_of_a_mixture_is_that_of_its_probabilities() -> None:
    ensemble, labels = drawn(2, 200, scale=3.0), [i % 4 for i in range(200)]
    aside, kept = calibration_split(200, 0.5)
    found = {s.name: s for s in evaluate_choice(ensemble, labels, calibration=aside, resamples=0).systems}
    after = found["mixture, temperature"]
    log_p = np.log(ensemble.mixture())
    best = metrics.fit_temperature(log_p[aside], np.array(labels)[aside])
    assert after.temperature == pytest.approx(best)
    scaled = torch.from_numpy(log_p / best).softmax(-1)[torch.from_numpy(kept), [labels[i] for i in kept]]
    assert after.nll.value == pytest.approx(-scaled.log().mean().item())
    assert after.accuracy.value == found["mixture"].accuracy.value
    assert "epistemic" not in after.detection


def test_disagreement_finds_what_is_elsewhere() -> None:
    """Here members agree; elsewhere each is sure of something else."""
    here, there = drawn(1, 30).log_probs.repeat(4, 1, 1), drawn(4, 20, scale=8.0).log_probs
    weights = torch.full((4,), 0.25)
    found = evaluate_choice(
        Opinion(here, weights), [0] * 30, out_of_distribution={"mixture": Opinion(there, weights)}, resamples=20
    )
    assert found.systems[0].out_of_distribution["epistemic"].auroc.value == 1
    assert found.systems[1].out_of_distribution["total"].auroc.value < 0.5  # one member alone is surer there


def test_groups_and_who_knows_them() -> None:
    """Member 0 knows the questions of group a, member 1 those of b; on the last neither is sure."""
    knows, guesses = [0.9, 0.1], [0.4, 0.6]
    found = evaluate_choice(
        opinion([knows, knows, guesses, guesses], [guesses, guesses, knows, knows]),
        [0] * 4,
        groups=["a", "a", "b", "b"],
        resamples=0,
    )
    assert found.groups is not None
    assert [(g.group, g.questions, g.accuracy, g.members) for g in found.groups] == [
        ("a", 2, 1.0, [1.0, 0.0]),
        ("b", 2, 1.0, [0.0, 1.0]),
    ]
    assert found.specialisation is not None
    assert found.specialisation.adjusted_rand == 1
    assert found.specialisation.led == [[1.0, 0.0], [0.0, 1.0]]
    assert found.specialisation.log_likelihood[0] == pytest.approx([math.log(0.9), math.log(0.4)])


def test_specialisation_counts_weights() -> None:
    found = specialisation([[0.0, 0.0], [0.5, -1.0]], [0.9, 0.1], ["x", "y"])
    assert found.led == [[1.0, 1.0], [0.0, 0.0]]
    assert found.adjusted_rand == 0
    with pytest.raises(ValueError, match="1 groups of 2"):
        specialisation([[0.0, 0.0]], [1.0], ["x"])


def test_calibration_split() -> None:
    aside, kept = calibration_split(10, 0.3)
    assert (len(aside), len(kept)) == (3, 7)
    assert sorted([*aside, *kept]) == list(range(10))
    assert [len(x) for x in calibration_split(1, 0.9)] == [0, 1]


# ---- Text ------------------------------------------------------------------------------------------------------------


def scored(ell: Tensor, tokens: list[int]) -> list[Score]:
    """Scores of two uniform members from log-likelihoods [2, N]."""
    mixed = (ell.double().logsumexp(0) - math.log(2)).tolist()
    return [
        Score(i, t, ell[:, i].tolist(), [0.5, 0.5], -x, x - float(ell[:, i].mean()))
        for i, (t, x) in enumerate(zip(tokens, mixed, strict=True))
    ]


def test_perplexity_by_hand() -> None:
    ell, tokens = torch.tensor([[-2.0, -6.0, -3.0], [-4.0, -3.0, -3.0]]), [2, 3, 1]
    scores = scored(ell, tokens)
    found = evaluate_perplexity(scores, torch.tensor([0.5, 0.5]), groups=["a", "b", "b"], resamples=200)
    assert (found.examples, found.tokens) == (3, 6)
    mixture, first, second = found.systems
    assert (first.nll.value, second.nll.value) == pytest.approx((11 / 6, 10 / 6))
    assert mixture.nll.value == pytest.approx(sum(s.mixture_nll for s in scores) / 6)
    assert mixture.perplexity.value == pytest.approx(math.exp(mixture.nll.value))
    assert mixture.nll.low < mixture.nll.value < mixture.nll.high
    assert found.jensen_gap == pytest.approx(21 / 12 - mixture.nll.value)
    assert found.groups is not None
    assert [(g.group, g.examples, g.tokens) for g in found.groups] == [("a", 1, 2), ("b", 2, 4)]
    assert found.groups[1].members == pytest.approx([9 / 4, 6 / 4])
    assert sum(g.tokens * g.nll for g in found.groups) == pytest.approx(6 * mixture.nll.value)
    gap = [s.jensen_gap / s.tokens for s in scores]
    assert found.most_contested == sorted(range(3), key=lambda i: -gap[i])
    assert found.specialisation is not None
    assert found.specialisation.led == [[1.0, 0.5], [0.0, 0.5]]
    other = evaluate_perplexity(scores, torch.tensor([0.5, 0.5]), baselines={"other": scores}, resamples=200)
    assert other.systems[-1][1:] == mixture[1:]
    assert np.isfinite(other.systems[-1].nll).all()
