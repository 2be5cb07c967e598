"""The loss of thumbs against TRL's formula, its bounds, and what contradicting thumbs ask of members."""

import math

import pytest
import torch

from renyi.objectives import (
    ThumbLoss,
    preference_log_likelihood,
    reference_point,
    renyi_loss,
    responsibilities,
    thumb_log_likelihood,
    thumb_logit,
)

RATIO = torch.tensor([[3.0, -2.0, 0.5, 1.0], [-1.0, 4.0, 0.0, 2.0]], dtype=torch.float64)
GOOD = torch.tensor([True, False, False, True])


def test_the_loss_is_kto_s_with_a_weight_for_each_kind():
    loss = ThumbLoss(beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    point = torch.tensor([0.7, 0.0], dtype=torch.float64)
    ell = thumb_log_likelihood(thumb_logit(RATIO, point, loss), GOOD, loss)
    for m, z in enumerate(point.tolist()):
        for i, up in enumerate(GOOD.tolist()):
            t = 0.5 * (RATIO[m, i].item() - z)
            expected = 2.0 * (1 - 1 / (1 + math.exp(-t))) if up else 0.5 * (1 - 1 / (1 + math.exp(t)))
            assert -ell[m, i].item() == pytest.approx(expected, rel=1e-12)


def test_a_reference_point_is_each_member_s_own_never_below_zero_and_has_no_gradient():
    ratio = RATIO.clone().requires_grad_()
    point = reference_point(ratio - 1.0)
    assert point.tolist() == pytest.approx([0.0, 0.25])
    assert not point.requires_grad
    assert reference_point(ratio - 3.0).tolist() == [0.0, 0.0]


def test_one_thumb_routes_no_further_than_its_bound():
    loss, members, alpha = ThumbLoss(), 4, 0.8
    logit = torch.tensor([60.0, -60.0, -60.0, -60.0], dtype=torch.float64)[:, None]
    ell = thumb_log_likelihood(logit, torch.tensor([True]), loss)
    bound = math.exp(alpha) / (math.exp(alpha) + members - 1)
    assert responsibilities(ell, alpha).max().item() == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_thumbs_that_contradict_each_other_ask_members_to_part_at_any_alpha(alpha, spread):
    """Not so a log-likelihood: the label's Bernoulli likelihood is least where no member parts."""
    loss = ThumbLoss()
    logit = torch.tensor([[spread] * 2, [-spread] * 2], dtype=torch.float64)
    labels = torch.tensor([True, False])
    parted = renyi_loss(thumb_log_likelihood(logit, labels, loss), alpha).mean().item()
    closed = 0.5 - math.log(math.cosh(alpha * (1 / (1 + math.exp(-spread)) - 0.5))) / alpha
    assert parted == pytest.approx(closed, rel=1e-9)
    assert parted < 0.5
    from renyi.objectives import LogRatios

    ell = preference_log_likelihood(LogRatios(torch.where(labels, logit, -logit) / 0.1, torch.zeros_like(logit)))
    assert renyi_loss(ell, alpha).mean().item() >= math.log(2) * (1 - 1e-12)
