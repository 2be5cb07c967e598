"""Losses of a pair against what their papers say of them, not against another copy of their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from renyi.objectives import (
    COUPLED_LOSSES,
    PAIR_LOSSES,
    LogRatios,
    PreferenceLoss,
    completion_log_prob,
    preference_log_likelihood,
    preference_margin,
    renyi_loss,
    responsibilities,
)

MEMBERS, PAIRS = 3, 7
SMOOTHED = {"label_smoothing": 0.1}


def ratios(seed: int = 0, dtype: torch.dtype = torch.float64) -> LogRatios:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, MEMBERS, PAIRS, generator=generator, dtype=torch.float64).to(dtype) * 3
    return LogRatios(chosen, rejected, torch.arange(1, PAIRS + 1), torch.arange(PAIRS, 0, -1))


def nothing_learned() -> LogRatios:
    zero = torch.zeros(MEMBERS, PAIRS, dtype=torch.float64)
    return LogRatios(zero, zero, torch.full((PAIRS,), 5), torch.full((PAIRS,), 3))


def test_sigmoid_is_bradley_terry():
    loss = PreferenceLoss(beta=0.3)
    found = preference_log_likelihood(ratios(), loss).exp()
    swapped = preference_log_likelihood(
        ratios()._replace(chosen=ratios().rejected, rejected=ratios().chosen), loss
    ).exp()
    torch.testing.assert_close(found + swapped, torch.ones_like(found))  # one of the two is preferred
    odds = torch.exp(0.3 * (ratios().chosen - ratios().rejected))
    torch.testing.assert_close(found / swapped, odds)
    torch.testing.assert_close(torch.sigmoid(preference_margin(ratios(), loss)), found)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "discopop"])  # it climbs first
def test_every_loss_drives_the_margin_up_from_the_reference(name):
    start = nothing_learned()
    chosen, rejected = start.chosen.clone().requires_grad_(), start.rejected.clone().requires_grad_()
    loss = PreferenceLoss(loss_type=(name,), **(SMOOTHED if name in ("robust", "exo_pair") else {}))
    preference_log_likelihood(start._replace(chosen=chosen, rejected=rejected), loss).sum().backward()
    assert (chosen.grad > rejected.grad).all()
    assert (rejected.grad < 0).all()


def test_a_robust_loss_is_unbiased_under_flipped_labels():
    loss = PreferenceLoss(loss_type=("robust",), beta=0.5, **SMOOTHED)
    flipped = ratios()._replace(chosen=ratios().rejected, rejected=ratios().chosen)
    seen = 0.9 * preference_log_likelihood(ratios(), loss) + 0.1 * preference_log_likelihood(flipped, loss)
    torch.testing.assert_close(seen, preference_log_likelihood(ratios(), PreferenceLoss(beta=0.5)))


def test_an_exo_loss_vanishes_where_the_policy_has_the_smoothed_label():
    margin = math.log(0.9 / 0.1)
    at = nothing_learned()._replace(
        chosen=torch.full((1, 1), margin / 0.1, dtype=torch.float64), rejected=torch.zeros(1, 1)
    )
    found = preference_log_likelihood(at, PreferenceLoss(loss_type=("exo_pair",), **SMOOTHED))
    assert found.item() == pytest.approx(0.0, abs=1e-12)  # a KL divergence of equal distributions
    assert (preference_log_likelihood(ratios(), PreferenceLoss(loss_type=("exo_pair",), **SMOOTHED)) < 0).all()


@pytest.mark.parametrize(("name", "target"), [("ipo", 1 / (2 * 0.2)), ("sppo_hard", 0.5 / 0.2)])
def test_squared_losses_vanish_at_their_target(name, target):
    lengths = torch.ones(1)
    chosen, rejected = (target, 0.0) if name == "ipo" else (target, -target)
    at = LogRatios(torch.full((1, 1), chosen), torch.full((1, 1), rejected), lengths, lengths)
    assert preference_log_likelihood(at, PreferenceLoss(beta=0.2, loss_type=(name,))).item() == pytest.approx(
        0, abs=1e-9
    )


def test_length_normalised_losses_do_not_see_length():
    long = ratios()._replace(
        chosen=ratios().chosen * 10, rejected=ratios().rejected * 10,
        chosen_tokens=ratios().chosen_tokens * 10, rejected_tokens=ratios().rejected_tokens * 10,
    )  # fmt: skip
    for name in ("ipo", "sigmoid_norm"):
        loss = PreferenceLoss(loss_type=(name,))
        torch.testing.assert_close(preference_log_likelihood(long, loss), preference_log_likelihood(ratios(), loss))
        with pytest.raises(ValueError, match="length"):
            preference_log_likelihood(LogRatios(ratios().chosen, ratios().rejected), loss)


def test_losses_add_up_with_their_weights():
    both = preference_log_likelihood(ratios(), PreferenceLoss(loss_type=("sigmoid", "hinge"), loss_weights=(0.8, 0.3)))
    alone = [preference_log_likelihood(ratios(), PreferenceLoss(loss_type=(name,))) for name in ("sigmoid", "hinge")]
    torch.testing.assert_close(both, 0.8 * alone[0] + 0.3 * alone[1])


def test_another_number_of_weights_than_of_losses_is_refused():
    for weights in ((0.8,), (0.8, 0.3, 0.1)):
        with pytest.raises(ValueError, match="argument 2"):
            preference_log_likelihood(ratios(), PreferenceLoss(loss_type=("sigmoid", "hinge"), loss_weights=weights))


@pytest.mark.parametrize(
    ("divergence", "f", "slope"),
    [
        ("forward_kl", lambda u: -torch.log(u), 1.0),
        ("js_divergence", lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2), 1.0),
        ("alpha_divergence", lambda u: (u**0.5 - 1) / (0.5 * (0.5 - 1)), 1.0),
    ],
)
def test_scores_are_the_derivative_of_f(divergence, f, slope):
    """Wang et al. 2023: a completion's reward is β f'(π/π_ref), up to a constant that the margin loses."""
    u = ratios().chosen.exp().requires_grad_()
    v = ratios().rejected.exp().requires_grad_()
    (du,), (dv,) = torch.autograd.grad(f(u).sum(), u), torch.autograd.grad(f(v).sum(), v)
    loss = PreferenceLoss(beta=1.0, f_divergence_type=divergence, f_alpha_divergence_coef=0.5)
    torch.testing.assert_close(preference_margin(ratios(), loss), slope * (du - dv))


def test_the_alpha_divergence_tends_to_the_reverse_kl():
    near = PreferenceLoss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 + 1e-5)
    at = PreferenceLoss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    torch.testing.assert_close(preference_margin(ratios(), near), preference_margin(ratios()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(preference_margin(ratios(), at), preference_margin(ratios()))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {}, -math.log(sigmoid(0.8))),
        ("hinge", {}, 1 - 0.8),
        ("ipo", {}, (3 / 4 + 1 / 2 - 1 / (2 * 0.2)) ** 2),
        ("sigmoid_norm", {}, -math.log(sigmoid(0.2 * (3 / 4 + 1 / 2)))),
        (
            "exo_pair",
            {"label_smoothing": 0.1},
            sigmoid(0.8) * math.log(sigmoid(0.8) / 0.9) + sigmoid(-0.8) * math.log(sigmoid(-0.8) / 0.1),
        ),
        ("nca_pair", {}, -math.log(sigmoid(0.6)) - math.log(sigmoid(-0.6)) / 2 - math.log(sigmoid(0.2)) / 2),
        ("robust", {"label_smoothing": 0.1}, (-0.9 * math.log(sigmoid(0.8)) + 0.1 * math.log(sigmoid(-0.8))) / 0.8),
        ("bco_pair", {}, -math.log(sigmoid(0.6)) - math.log(sigmoid(0.2))),
        ("sppo_hard", {}, (3 - 2.5) ** 2 + (-1 + 2.5) ** 2),
        ("apo_zero", {}, 1 - sigmoid(0.6) + sigmoid(-0.2)),
        ("apo_down", {}, sigmoid(0.6) + 1 - sigmoid(0.8)),
        (
            "discopop",
            {"discopop_tau": 0.5},
            -math.log(sigmoid(0.8)) * sigmoid(-1.6) + math.exp(-0.8) * sigmoid(1.6),
        ),
    ],
)
def test_every_loss_by_hand(name, settings, expected):
    """β = 0.2, log-ratios 3 of 4 tokens and −1 of 2 tokens: β times them is 0.6 and −0.2, and the margin is 0.8."""
    of_pair = LogRatios(
        *(torch.tensor([[x]], dtype=torch.float64) for x in (3.0, -1.0)), torch.tensor([4]), torch.tensor([2])
    )
    loss = PreferenceLoss(beta=0.2, loss_type=(name,), **settings)
    assert preference_log_likelihood(of_pair, loss).item() == pytest.approx(-expected, rel=1e-12)


def test_a_hinge_pays_nothing_beyond_a_margin_of_one():
    at = LogRatios(torch.tensor([[5.0, 5.1, 4.9]]), torch.zeros(1, 3))
    found = preference_log_likelihood(at, PreferenceLoss(beta=0.2, loss_type=("hinge",)))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, -0.02]]))


def test_a_completion_without_tokens_counts_as_one_token():
    none = LogRatios(*(torch.full((1, 1), x) for x in (3.0, -1.0)), torch.tensor([0]), torch.tensor([0]))
    one = none._replace(chosen_tokens=torch.tensor([1]), rejected_tokens=torch.tensor([1]))
    for name in ("ipo", "sigmoid_norm"):
        loss = PreferenceLoss(loss_type=(name,))
        assert torch.equal(preference_log_likelihood(none, loss), preference_log_likelihood(one, loss))


@pytest.mark.parametrize("lost", ["chosen_tokens", "rejected_tokens"])
def test_one_length_is_not_enough(lost):
    with pytest.raises(ValueError, match="ipo, hinge normalises by length"):
        preference_log_likelihood(ratios()._replace(**{lost: None}), PreferenceLoss(loss_type=("ipo", "hinge")))


def test_an_alpha_divergence_stays_finite_far_out():
    """Its score is e^((c − 1) ratio), which overflows; it is kept at e^80, with its sign."""
    far = torch.tensor([[1e4]])
    loss = PreferenceLoss(beta=1.0, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    margin = preference_margin(LogRatios(far, torch.zeros(1, 1)), loss).item()
    assert margin == pytest.approx(math.exp(80), rel=1e-5)


@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_losses_that_couple_pairs_are_refused(name):
    with pytest.raises(ValueError, match=f"loss_type '{name}' couples pairs: {COUPLED_LOSSES[name]}"):
        preference_log_likelihood(ratios(), PreferenceLoss(loss_type=(name,)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown loss_type 'sigmod'; one of sigmoid, hinge, ipo"):
        preference_log_likelihood(ratios(), PreferenceLoss(loss_type=("sigmod",)))
    with pytest.raises(ValueError, match="unknown f_divergence_type 'kl'; one of reverse_kl, forward_kl"):
        preference_log_likelihood(ratios(), PreferenceLoss(f_divergence_type="kl"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sigmoid", "bco_pair"])
def test_half_precision_is_raised_before_anything_is_rounded(dtype, name):
    """Of both completions: "bco_pair" never takes the one from the other."""
    half, loss = ratios(dtype=dtype), PreferenceLoss(loss_type=(name,))
    raised = half._replace(chosen=half.chosen.float(), rejected=half.rejected.float())
    found = preference_log_likelihood(half, loss)
    assert found.dtype is torch.float32
    assert torch.equal(found, preference_log_likelihood(raised, loss))
    assert torch.equal(preference_margin(half, loss), preference_margin(raised, loss))


@given(margin=st.floats(-1e4, 1e4))
def test_sigmoid_is_finite_and_exact_far_out(margin):
    at = LogRatios(torch.tensor([[margin]]), torch.zeros(1, 1))
    found = preference_log_likelihood(at, PreferenceLoss(beta=1.0)).item()
    exact = -math.log1p(math.exp(-margin)) if margin > -700 else margin
    assert found == pytest.approx(exact, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_coupled_gradient_is_weighted_by_responsibilities(alpha):
    """∂loss_α/∂(log-ratio) = −r_m ∂ℓ_m/∂(log-ratio), with ∂ℓ/∂(chosen) = β σ(−Δ) (DESIGN 3.1, DPO's eq. 7)."""
    chosen = ratios().chosen.clone().requires_grad_()
    coupled = ratios()._replace(chosen=chosen)
    ell = preference_log_likelihood(coupled)
    renyi_loss(ell, alpha).sum().backward()
    margin = preference_margin(ratios())
    expected = -responsibilities(ell.detach(), alpha) * 0.1 * torch.sigmoid(-margin)
    torch.testing.assert_close(chosen.grad, expected)


def test_a_contradiction_alone_never_parts_members():
    """One label is one bit: on a pair labelled both ways, opposite members never pay less than two undecided ones."""
    decided = 1e3 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # members × labels
    undecided = torch.zeros(2, 2)
    for alpha in (0.1, 0.5, 0.8, 1.0):
        apart = renyi_loss(logsigmoid(decided), alpha).mean().item()
        together = renyi_loss(logsigmoid(undecided), alpha).mean().item()
        assert together == pytest.approx(math.log(2), rel=1e-6)
        assert apart == pytest.approx(math.log(2) / alpha, rel=1e-6)


def test_completions_are_summed_and_tails_discounted():
    """LD-DPO: tokens beyond the shorter completion count ld_alpha."""
    token_log_probs = torch.tensor([[[-1.0, -2.0, -4.0, -8.0], [0.0, -1.0, -1.0, 0.0]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    torch.testing.assert_close(completion_log_prob(token_log_probs, mask), torch.tensor([[-15.0, -2.0]]))
    discounted = completion_log_prob(token_log_probs, mask, ld_alpha=0.5)
    torch.testing.assert_close(discounted, torch.tensor([[-3.0 - 0.5 * 12.0, -2.0]]))
    torch.testing.assert_close(completion_log_prob(token_log_probs, mask, 1.0), torch.tensor([[-15.0, -2.0]]))
    torch.testing.assert_close(completion_log_prob(token_log_probs, mask, 0.0), torch.tensor([[-3.0, -2.0]]))


def test_the_shorter_completion_is_each_pairs_own():
    """Two pairs of lengths 3 and 1, 2 and 4, for two members: chosen rows first."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    token_log_probs = -mask * torch.tensor([[[1.0]], [[2.0]]])
    found = completion_log_prob(token_log_probs, mask, ld_alpha=0.1)
    lengths = torch.tensor([1 + 2 * 0.1, 2.0, 1.0, 2 + 2 * 0.1])
    torch.testing.assert_close(found, -lengths * torch.tensor([[1.0], [2.0]]))
