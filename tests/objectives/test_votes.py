"""The likelihood of votes: probabilities, limits, derivatives, and today's loss as a special case."""

import math

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from renyi.objectives import (
    PAIR_LOSSES,
    LogRatios,
    PreferenceLoss,
    Votes,
    outcome_log_probs,
    preference_log_likelihood,
    tie_strength_of,
    votes_log_likelihood,
    votes_slope,
)

MARGINS = torch.linspace(-40, 40, 33, dtype=torch.float64)


def ratios(pairs: int = 5, members: int = 2) -> LogRatios:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, members, pairs, generator=generator, dtype=torch.float64)
    return LogRatios(chosen, rejected, torch.arange(3, 3 + pairs), torch.arange(9, 9 + pairs))


def votes(*counts: tuple[int, int, int]) -> Votes:
    return Votes(*torch.tensor(counts, dtype=torch.float64).T)


@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.5, 2.0, 1e6])
def test_probabilities_sum_to_one_and_sides_exchange(strength):
    log_p = outcome_log_probs(MARGINS, strength)
    torch.testing.assert_close(log_p.exp().sum(dim=-1), torch.ones_like(MARGINS), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_p[:, [1, 0, 2]], outcome_log_probs(-MARGINS, strength))
    torch.testing.assert_close(log_p[:, 0] - log_p[:, 1], MARGINS)  # without a tie the odds are Bradley–Terry's
    if strength > 0:  # Davidson: a tie is half of either
        expected = math.log(strength) + (log_p[:, 0] + log_p[:, 1]) / 2
        torch.testing.assert_close(log_p[:, 2], expected)


def test_limits_of_the_tie_strength():
    near, at = outcome_log_probs(MARGINS, 1e-12), outcome_log_probs(MARGINS, 0.0)
    torch.testing.assert_close(near[:, :2], at[:, :2], rtol=0, atol=1e-9)
    assert (at[:, 2] == -math.inf).all()
    torch.testing.assert_close(at[:, 0], torch.nn.functional.logsigmoid(MARGINS))
    assert (outcome_log_probs(MARGINS[10:-10], 1e12)[:, 2] > -1e-3).all()
    with pytest.raises(ValueError, match="tie_strength"):
        outcome_log_probs(MARGINS, -1.0)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_slope_and_information_are_the_derivatives(strength):
    margin = torch.tensor([-2.0, -0.1, 0.0, 0.4, 3.0], dtype=torch.float64)
    given = votes((1, 0, 0), (2, 1, 0), (0, 3, 0), (1, 1, 0), (2, 0, 0))
    if strength:
        given = given._replace(tie=torch.tensor([0, 1, 2, 0, 4.0], dtype=torch.float64))

    def total(delta):
        log_p = outcome_log_probs(delta, strength)
        terms = log_p * torch.stack(given, dim=-1)
        return (terms if strength else terms[:, :2]).sum()

    slope, information = votes_slope(margin, given, strength)
    torch.testing.assert_close(slope, jacobian(total, margin))
    torch.testing.assert_close(information, -hessian(total, margin).diagonal())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_one_vote_is_the_loss_of_the_pair_and_k_votes_are_its_weight(name):
    loss = PreferenceLoss(loss_type=(name,), beta=0.3, label_smoothing=0.01 if name in ("robust", "exo_pair") else 0.0)
    one = votes_log_likelihood(ratios(), votes(*[(1, 0, 0)] * 5), loss)
    assert torch.equal(one, preference_log_likelihood(ratios(), loss))
    four = votes_log_likelihood(ratios(), votes(*[(4, 0, 0)] * 5), loss)
    weighted = PreferenceLoss(**{**loss.__dict__, "loss_weights": (4.0,)})
    torch.testing.assert_close(four, preference_log_likelihood(ratios(), weighted))


def test_a_vote_for_the_rejected_is_the_pair_turned_round():
    given, loss = ratios(), PreferenceLoss(beta=0.3)
    turned = LogRatios(given.rejected, given.chosen, given.rejected_tokens, given.chosen_tokens)
    for name in ("sigmoid", "ipo", "nca_pair", "sigmoid_norm"):
        loss = PreferenceLoss(beta=0.3, loss_type=(name,))
        found = votes_log_likelihood(given, votes(*[(2, 3, 0)] * 5), loss)
        expected = 2 * preference_log_likelihood(given, loss) + 3 * preference_log_likelihood(turned, loss)
        torch.testing.assert_close(found, expected)


def test_ties_are_labels_too():
    loss, given = PreferenceLoss(beta=0.3, tie_strength=0.8), ratios()
    found = votes_log_likelihood(given, votes(*[(1, 2, 3)] * 5), loss)
    log_p = outcome_log_probs(0.3 * (given.chosen - given.rejected), 0.8)
    torch.testing.assert_close(found, log_p @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    for settings in ({"tie_strength": 0.0}, {"loss_type": ("ipo",), "tie_strength": 0.8}):
        with pytest.raises(ValueError, match="ties have no likelihood"):
            votes_log_likelihood(given, votes(*[(1, 0, 1)] * 5), PreferenceLoss(**settings))


def test_the_strength_makes_equals_tie_as_often_as_seen():
    strength = tie_strength_of(votes((3, 1, 2), (1, 1, 2)))
    assert outcome_log_probs(torch.zeros(()), strength).exp()[2] == pytest.approx(4 / 10)
    assert tie_strength_of(votes((3, 1, 0))) == 0
    with pytest.raises(ValueError, match="every label is a tie"):
        tie_strength_of(votes((0, 0, 2)))
