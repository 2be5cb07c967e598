"""Truths about the α-Rényi loss: its exact value, limits, symmetries and derivatives, and a known optimum."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from renyi.objectives import (
    QUANTITIES,
    effective_members,
    example_loss,
    example_responsibilities,
    jensen_gap,
    mixture_log_probs,
    mixture_logits,
    renyi_loss,
    responsibilities,
    running_log_weights,
)

ALPHAS = [0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.8, 1.0]
alphas = st.sampled_from(ALPHAS) | st.floats(0.0, 1.0)

properties = settings(max_examples=60, deadline=None)


@st.composite
def log_likelihoods(draw, min_members=1, dtype=torch.float64) -> Tensor:
    """[M] between −1e5 and 0: a common offset and a spread, each over ten orders of magnitude."""
    offset, spread = (10.0 ** draw(st.floats(-5.0, 4.69)) for _ in range(2))
    shares = draw(st.lists(st.floats(0.0, 1.0, width=16), min_size=min_members, max_size=6))
    return -(offset + spread * torch.tensor(shares, dtype=torch.float64)).to(dtype)


def weights_for(members: int, **kwargs) -> st.SearchStrategy[Tensor]:
    logs = st.lists(st.floats(-30.0, 5.0, width=16), min_size=members, max_size=members)
    return logs.map(lambda values: torch.tensor(values, **kwargs))


def exact_loss(log_likelihood: Tensor, alpha: float, log_weights: Tensor | None = None) -> Decimal:
    """The definition, term by term, in decimal arithmetic of 400 digits: it can afford to subtract."""
    with localcontext() as context:
        context.prec = 400
        ell = [Decimal(value) for value in log_likelihood.tolist()]
        logs = [0.0] * len(ell) if log_weights is None else log_weights.tolist()
        raw = [Decimal(value).exp() for value in logs]
        weights = [value / sum(raw) for value in raw]
        if alpha < 1e-100:  # further down, the difference from the limit is below a hundred digits
            return -sum(w * x for w, x in zip(weights, ell, strict=True))
        order = Decimal(alpha)
        return -sum(w * (order * x).exp() for w, x in zip(weights, ell, strict=True)).ln() / order


def relative_error(loss: Tensor, exact: Decimal) -> float:
    return float(abs(Decimal(loss.item()) - exact) / abs(exact))


def random_log_likelihood(*shape: int, scale: float = 3.0, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)


# The value


@properties
@given(data=st.data(), alpha=alphas, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_within_one_part_in_a_million_of_exact_arithmetic(data, alpha, dtype):
    ell = data.draw(log_likelihoods(dtype=dtype))
    log_weights = data.draw(st.none() | weights_for(len(ell)))
    exact = exact_loss(ell, alpha, log_weights)
    loss = renyi_loss(ell, alpha, log_weights)
    assert loss.dtype == torch.float32
    assert relative_error(loss, exact) <= 1e-6
    assert relative_error(renyi_loss(ell, torch.tensor(alpha), log_weights), exact) <= 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "values",
    [
        [-1e5, -1e5, -1e5],  # nothing to gain from any α
        [-1e-3, -1e5],  # all of float32's range between two members
        [-1e5, -99_999.9921875],  # neighbours in float32
        [-0.5, -0.5000001, -0.4999999],
        [-1e-20, -2e-20],
        [-20_000.0, -40_000.0, -60_000.0, -80_000.0],
    ],
)
def test_extreme_log_likelihoods_in_float32(values, alpha):
    ell = torch.tensor(values)
    for order in (alpha, torch.tensor(alpha)):
        assert relative_error(renyi_loss(ell, order), exact_loss(ell, alpha)) <= 1e-6


@pytest.mark.parametrize("alpha_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_precision_is_that_of_the_log_likelihoods(dtype, alpha_dtype):
    for ell in (random_log_likelihood(3, dtype=dtype), random_log_likelihood(3, 4, dtype=dtype)):
        loss = renyi_loss(ell, torch.tensor(0.5, dtype=alpha_dtype), torch.zeros(3, dtype=torch.float64))
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss, renyi_loss(ell, 0.5))


@properties
@given(ell=log_likelihoods(), alpha=alphas)
def test_float64_stays_float64(ell, alpha):
    loss = renyi_loss(ell, alpha)
    assert loss.dtype == torch.float64
    assert relative_error(loss, exact_loss(ell, alpha)) <= 1e-14


def test_the_textbook_formula_would_not_do():
    """What the care is for: the same formula without it fails both tests above in float32."""
    ell, alpha = torch.tensor([-1.0, -3.0]), 1e-8
    textbook = -((alpha * ell).logsumexp(0) - math.log(2)) / alpha
    assert relative_error(textbook, exact_loss(ell, alpha)) > 0.1
    assert relative_error(renyi_loss(ell, alpha), exact_loss(ell, alpha)) < 1e-6


@properties
@given(data=st.data(), ell=log_likelihoods())
def test_both_ends(data, ell):
    """α = 0 is the members' mean NLL, α = 1 the NLL of their mixture."""
    log_weights = data.draw(weights_for(len(ell), dtype=torch.float64))
    weights = log_weights.softmax(0)
    torch.testing.assert_close(renyi_loss(ell, 0.0, log_weights), -(weights * ell).sum())
    mixture = -(log_weights.log_softmax(0) + ell).logsumexp(0)
    torch.testing.assert_close(renyi_loss(ell, 1.0, log_weights), mixture)


@properties
@given(data=st.data(), ell=log_likelihoods(), first=alphas, second=alphas)
def test_never_increases_with_alpha_and_stays_between_its_bounds(data, ell, first, second):
    log_weights = data.draw(st.none() | weights_for(len(ell), dtype=torch.float64))
    small, large = sorted([first, second])
    best, at_large, at_small, mean = (
        -ell.max(),
        renyi_loss(ell, large, log_weights),
        renyi_loss(ell, small, log_weights),
        renyi_loss(ell, 0.0, log_weights),
    )
    slack = 1e-14 * ell.abs().max()
    assert best - slack <= at_large <= at_small + slack
    assert at_small - slack <= mean <= -ell.min() + slack


@properties
@given(ell=log_likelihoods(dtype=torch.float32), alpha=alphas)
def test_one_member_pays_its_own_nll_exactly(ell, alpha):
    alone = ell.unsqueeze(0)  # [1, B]
    assert torch.equal(renyi_loss(alone, alpha), -ell)
    assert torch.equal(responsibilities(alone, alpha), torch.ones_like(alone))
    assert torch.equal(jensen_gap(alone), torch.zeros_like(ell))


@properties
@given(data=st.data(), ell=log_likelihoods(min_members=2), alpha=alphas)
def test_permuting_members_permutes_everything(data, ell, alpha):
    log_weights = data.draw(weights_for(len(ell), dtype=torch.float64))
    order = torch.tensor(data.draw(st.permutations(range(len(ell)))))
    torch.testing.assert_close(renyi_loss(ell[order], alpha, log_weights[order]), renyi_loss(ell, alpha, log_weights))
    torch.testing.assert_close(
        responsibilities(ell[order], alpha, log_weights[order]),
        responsibilities(ell, alpha, log_weights)[order],
    )


@properties
@given(ell=log_likelihoods(), alpha=alphas, shift=st.floats(-100.0, 100.0))
def test_shifting_every_member_shifts_the_loss_and_nothing_else(ell, alpha, shift):
    slack = {"rtol": 1e-12, "atol": 1e-9}
    torch.testing.assert_close(renyi_loss(ell + shift, alpha), renyi_loss(ell, alpha) - shift, **slack)
    torch.testing.assert_close(responsibilities(ell + shift, alpha), responsibilities(ell, alpha), **slack)
    torch.testing.assert_close(jensen_gap(ell + shift), jensen_gap(ell), **slack)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4), (2, 0)])
def test_any_trailing_shape_is_a_batch_of_examples(shape):
    ell = random_log_likelihood(*shape)
    loss, shares = renyi_loss(ell, 0.7), responsibilities(ell, 0.7)
    assert loss.shape == jensen_gap(ell).shape == effective_members(shares).shape == shape[1:]
    assert shares.shape == shape
    flat = ell.reshape(shape[0], -1)
    for i, value in enumerate(loss.flatten()):
        torch.testing.assert_close(value, renyi_loss(flat[:, i], 0.7))


# Responsibilities, the Jensen gap, effective members


@pytest.mark.parametrize("members", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_members_that_agree_share_exactly_alike(members, alpha):
    ell = random_log_likelihood(5, scale=1e5, dtype=torch.float32).expand(members, 5)
    assert torch.equal(responsibilities(ell, alpha), torch.full_like(ell, 1 / members))
    assert torch.equal(renyi_loss(ell, alpha), -ell[0])
    assert torch.equal(jensen_gap(ell), torch.zeros(5))


def test_at_alpha_zero_the_shares_are_the_weights():
    ell = random_log_likelihood(3, 6, scale=1e5, dtype=torch.float32)
    log_weights = torch.tensor([0.5, -1.0, 2.0])
    expected = log_weights.softmax(0).unsqueeze(1).expand(3, 6)
    torch.testing.assert_close(responsibilities(ell, 0.0, log_weights), expected, rtol=1e-6, atol=0.0)
    assert torch.equal(responsibilities(ell, 0.0), torch.full_like(ell, 1 / 3))


def test_at_alpha_one_the_shares_are_bayes_posterior():
    joint = torch.tensor([0.5 * 0.2, 0.25 * 0.4, 0.25 * 0.8], dtype=torch.float64)
    ell, weights = torch.tensor([0.2, 0.4, 0.8]).double().log(), torch.tensor([0.5, 0.25, 0.25]).double()
    shares = responsibilities(ell, 1.0, weights.log())
    torch.testing.assert_close(shares, joint / joint.sum(), rtol=1e-7, atol=0.0)


def test_float32_shares_hold_at_very_low_log_likelihoods():
    """α ℓ itself has an error of 0.004 nats at −1e5, so the shares must come from differences."""
    ell = torch.tensor([-100_000.0, -99_999.0])
    shares = responsibilities(ell, 0.8)
    assert shares[1].item() == pytest.approx(1 / (1 + math.exp(-0.8)), rel=1e-6)


@properties
@given(data=st.data(), ell=log_likelihoods(dtype=torch.float32))
def test_the_jensen_gap_is_the_fall_of_the_loss_and_never_negative(data, ell):
    log_weights = data.draw(st.none() | weights_for(len(ell)))
    gap = jensen_gap(ell, log_weights)
    assert gap >= 0
    exact = exact_loss(ell, 0.0, log_weights) - exact_loss(ell, 1.0, log_weights)
    # The error goes with the spread of the members, not with their distance from 0.
    spread = (ell.max() - ell.min()).item()
    assert abs(gap.item() - float(exact)) <= 1e-6 * spread + 1e-100


def test_the_jensen_gap_is_not_negative_by_rounding():
    """Near agreement the gap is of the second order in the spread, below the last digit of what it is taken from."""
    ell = -1.0 + random_log_likelihood(4, 20_000, scale=1e-5, dtype=torch.float32)
    assert (jensen_gap(ell, torch.tensor([0.3, -1.1, 0.7, 1.9])) >= 0).all()


def test_effective_members_of_known_shares():
    examples = [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.7, 0.2, 0.1, 0.0]]
    shares = torch.tensor(examples).T
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    torch.testing.assert_close(effective_members(shares), torch.tensor([1.0, 2.0, 4.0, math.exp(entropy)]))


def test_effective_members_has_a_gradient_where_a_share_is_zero():
    shares = torch.tensor([0.6, 0.4, 0.0], requires_grad=True)
    effective_members(shares).backward()
    assert shares.grad.isfinite().all()


# Log-weights


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_weight_of_two_thirds_is_a_member_counted_twice(alpha):
    ell = random_log_likelihood(2, 4)
    log_weights = torch.tensor([1.0, 2.0], dtype=torch.float64).log()
    counted = ell[[0, 1, 1]]
    torch.testing.assert_close(renyi_loss(ell, alpha, log_weights), renyi_loss(counted, alpha))
    torch.testing.assert_close(jensen_gap(ell, log_weights), jensen_gap(counted))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_weights_are_normalised_inside(alpha):
    ell, log_weights = random_log_likelihood(3, 4), torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(renyi_loss(ell, alpha, log_weights + 7.0), renyi_loss(ell, alpha, log_weights))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dropped_value", [0.0, -1e5, 1e30, math.inf, -math.inf, math.nan])
def test_a_dropped_member_leaves_no_trace(alpha, dropped_value):
    kept = random_log_likelihood(2, 4, scale=50.0, dtype=torch.float32)
    ell = torch.cat([kept[:1], torch.full((1, 4), dropped_value), kept[1:]]).requires_grad_()
    log_weights = torch.tensor([0.0, -math.inf, 0.0], requires_grad=True)

    loss, shares = renyi_loss(ell, alpha, log_weights), responsibilities(ell, alpha, log_weights)
    loss.sum().backward()
    torch.testing.assert_close(loss, renyi_loss(kept, alpha))
    torch.testing.assert_close(shares[[0, 2]], responsibilities(kept, alpha))
    torch.testing.assert_close(jensen_gap(ell, log_weights), jensen_gap(kept))
    assert torch.equal(shares[1], torch.zeros(4))
    assert torch.equal(ell.grad[1], torch.zeros(4))
    assert ell.grad.isfinite().all()
    assert log_weights.grad.isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_member_of_hardly_any_weight_that_alone_explains(alpha):
    """In float32 Σ w exp(α d) − 1 is then −1 exactly, on the pole of log1p: the loss and its gradient stay finite."""
    ell = torch.tensor([0.0, -1e5], requires_grad=True)
    log_weights = torch.tensor([-40.0, 0.0], requires_grad=True)
    loss = renyi_loss(ell, alpha, log_weights)
    loss.backward()
    assert relative_error(loss, exact_loss(ell, alpha, log_weights)) <= 1e-6
    torch.testing.assert_close(ell.grad, -responsibilities(ell, alpha, log_weights).detach())
    assert log_weights.grad.isfinite().all()


def test_weights_of_each_example():
    ell = random_log_likelihood(3, 4, 2)
    log_weights = random_log_likelihood(3, 4, seed=1)
    loss = renyi_loss(ell, 0.6, log_weights)
    for b in range(4):
        torch.testing.assert_close(loss[b], renyi_loss(ell[:, b], 0.6, log_weights[:, b]))


# Derivatives


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("log_weights", [None, torch.tensor([0.3, -4.0, 1.0, 0.0])])
def test_the_gradient_is_minus_the_responsibilities(alpha, scale, log_weights):
    ell = random_log_likelihood(4, 3, 2, scale=scale, dtype=torch.float32).requires_grad_()
    renyi_loss(ell, alpha, log_weights).sum().backward()
    torch.testing.assert_close(ell.grad, -responsibilities(ell, alpha, log_weights), rtol=2e-6, atol=1e-30)


def test_at_alpha_zero_the_gradient_is_exactly_minus_the_weights():
    """So at α = 0 each member trains as if alone: nothing of the others, not even in the last digit."""
    ell = random_log_likelihood(3, 8, scale=200.0, dtype=torch.float32).requires_grad_()
    renyi_loss(ell, 0.0).sum().backward()
    assert torch.equal(ell.grad, torch.full_like(ell, -1 / 3))


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.3, 1.0])
def test_the_gradient_of_bfloat16_is_bfloat16(alpha):
    ell = random_log_likelihood(4, 3, dtype=torch.bfloat16).requires_grad_()
    renyi_loss(ell, alpha).sum().backward()
    assert ell.grad.dtype == torch.bfloat16
    assert torch.equal(ell.grad, -responsibilities(ell, alpha).bfloat16())


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.3, 1.0])
def test_learned_weights_move_towards_the_members_that_explain(alpha):
    """∂loss/∂log w = (w − r)/α, which goes to w (mean ℓ − ℓ) as α → 0."""
    ell = random_log_likelihood(3, scale=4.0)
    log_weights = torch.tensor([0.2, -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(renyi_loss(ell, alpha, log_weights), log_weights)
    weights = log_weights.softmax(0)
    if alpha <= 1e-8:
        expected = weights * ((weights * ell).sum() - ell)
    else:
        expected = (weights - responsibilities(ell, alpha, log_weights)) / alpha
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_the_hessian_is_minus_alpha_times_the_covariance_of_the_shares(alpha, scale):
    ell = random_log_likelihood(4, scale=scale)
    r = responsibilities(ell, alpha)
    hessian = torch.func.hessian(renyi_loss)(ell, alpha)
    torch.testing.assert_close(hessian, -alpha * (r.diag() - r.outer(r)), rtol=1e-9, atol=1e-12)


# torch.func and torch.compile


@pytest.mark.parametrize("alpha", [0.0, 0.8, torch.tensor(0.0), torch.tensor(0.8)])
def test_func_transforms(alpha):
    ell = random_log_likelihood(3, 5)
    shares = responsibilities(ell, alpha)
    by_example = torch.func.vmap(renyi_loss, in_dims=(1, None))
    torch.testing.assert_close(by_example(ell, alpha), renyi_loss(ell, alpha))
    torch.testing.assert_close(torch.func.grad(renyi_loss)(ell[:, 0], alpha), -shares[:, 0])
    per_example_grad = torch.func.vmap(torch.func.grad(renyi_loss), in_dims=(1, None), out_dims=1)
    torch.testing.assert_close(per_example_grad(ell, alpha), -shares)
    jacobian = torch.func.jacrev(renyi_loss)(ell, alpha)  # [B, M, B]: examples do not meet
    torch.testing.assert_close(jacobian, -torch.einsum("mb,bc->bmc", shares, torch.eye(5).double()))


def test_a_whole_curve_over_alpha_by_vmap():
    ell, orders = random_log_likelihood(3, 5), torch.linspace(0, 1, 11, dtype=torch.float64)
    curve = torch.func.vmap(renyi_loss, in_dims=(None, 0))(ell, orders)
    torch.testing.assert_close(curve, torch.stack([renyi_loss(ell, alpha) for alpha in orders.tolist()]))


def test_one_compilation_serves_a_whole_schedule():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(ell: Tensor, alpha: Tensor, log_weights: Tensor) -> tuple[Tensor, ...]:
        shares = responsibilities(ell, alpha, log_weights)
        return renyi_loss(ell, alpha, log_weights), shares, jensen_gap(ell), effective_members(shares)

    log_weights = torch.tensor([0.0, 0.5, -0.5, -math.inf])
    for alpha in (0.0, 0.2, 0.4, 0.8):
        ell = random_log_likelihood(4, 6, dtype=torch.float32).requires_grad_()
        loss, shares, gap, effective = step(ell, torch.tensor(alpha), log_weights)
        torch.testing.assert_close(loss, renyi_loss(ell, alpha, log_weights))
        torch.testing.assert_close(shares, responsibilities(ell, alpha, log_weights))
        torch.testing.assert_close(gap, jensen_gap(ell))
        torch.testing.assert_close(effective, effective_members(shares))
        (gradient,) = torch.autograd.grad(loss.sum(), ell)
        torch.testing.assert_close(gradient, -shares.detach())
    assert counter.frame_count == 1


def test_compiles_with_a_float_alpha_and_bfloat16():
    compiled = torch.compile(renyi_loss, backend="eager", fullgraph=True)
    ell = random_log_likelihood(3, 4, dtype=torch.bfloat16)
    for alpha in (0.0, 0.25, 0.75):
        torch.testing.assert_close(compiled(ell, alpha), renyi_loss(ell, alpha))


# What is refused, and what is passed on


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf, -math.inf, 2, -1])
def test_an_alpha_outside_zero_to_one_is_refused(alpha):
    ell = random_log_likelihood(2, 3)
    for function in (renyi_loss, responsibilities):
        with pytest.raises(ValueError, match="alpha is"):
            function(ell, alpha)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (4,), (3, 4), (3, 5, 1)])
def test_log_weights_of_other_members_are_refused(shape):
    """[1] above all: broadcast, it would weigh every member by 1 and the mixture by M."""
    ell = random_log_likelihood(3, 5)
    for call in (
        lambda w: renyi_loss(ell, 0.5, w),
        lambda w: responsibilities(ell, 0.5, w),
        lambda w: jensen_gap(ell, w),
    ):
        with pytest.raises(ValueError, match="log_weights has shape"):
            call(torch.zeros(shape))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_nan_is_passed_on_and_stays_in_its_example(alpha):
    ell = random_log_likelihood(3, 2)
    ell[1, 0] = math.nan
    assert renyi_loss(ell, alpha).isnan().tolist() == [True, False]
    assert responsibilities(ell, alpha).isnan().any(0).tolist() == [True, False]


@pytest.mark.parametrize("alpha", [1e-8, 0.5, 1.0])
def test_an_impossible_example(alpha):
    """p = 0 for one of two members halves the mixture of order 1; for both it costs infinity."""
    ell = torch.tensor([[-1.0, -math.inf], [-math.inf, -math.inf]], requires_grad=True)
    loss = renyi_loss(ell, alpha)
    assert loss[0].item() == pytest.approx(1.0 + math.log(2) / alpha, rel=1e-6)
    assert loss[1].item() == math.inf
    (gradient,) = torch.autograd.grad(loss[0], ell)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([-1.0, 0.0]))


# An optimum known by theory


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.3, 0.5, 0.8, 1.0])
def test_gaussian_particles_spread_above_the_critical_alpha_only(alpha):
    """Members N(θ_m, 1), data N(0, 4): θ is best spread as N(0, max(0, 4 − 1/α)), so critical alpha is 1/4.

    Eight particles are a quadrature of it, which at their optimum has its variance to within 2 %.
    """
    x = torch.linspace(-12.0, 12.0, 241, dtype=torch.float64)
    density = (-(x**2) / 8).softmax(0)
    means = torch.linspace(-1.0, 1.2, 8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([means], max_iter=200, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        ell = -((x - means.unsqueeze(1)) ** 2) / 2 - math.log(2 * math.pi) / 2
        loss = (density * renyi_loss(ell, alpha)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert means.var(correction=0).item() == pytest.approx(max(0.0, 4 - 1 / alpha), rel=0.02, abs=1e-3)


# Rules that others share


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_gradient_of_an_examples_loss_is_its_responsibilities(quantity, alpha):
    """For both quantities; and at alpha 0 they are the same loss."""
    ell = (-20 * torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    tokens, log_weights = torch.tensor([1, 2, 7, 30, 0]), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    loss = example_loss(ell, tokens, alpha, log_weights, quantity)
    (gradient,) = torch.autograd.grad(loss.sum(), ell)
    r = example_responsibilities(ell.detach(), tokens, alpha, log_weights, quantity)
    torch.testing.assert_close(-gradient, r, rtol=1e-10, atol=1e-12)
    units = tokens.clamp(min=1) if quantity == "length_normalised" else 1
    expected = (log_weights[:, None] + alpha * ell.detach() / units).softmax(0)
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=1e-12)
    if alpha == 0:
        torch.testing.assert_close(loss, renyi_loss(ell, 0.0, log_weights))


def test_an_unknown_quantity_is_refused():
    with pytest.raises(ValueError, match="sequence"):
        example_loss(torch.zeros(2, 1), torch.ones(1), 0.5, None, "tokens")


def test_running_weights_are_the_posterior_of_the_prefix():
    log_p = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_pi = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    log_w = log_pi[:, None].expand(3, 4)
    for t in range(6):
        log_w = running_log_weights(log_w, log_p[..., t])
    torch.testing.assert_close(log_w, (log_pi[:, None] + log_p.sum(-1)).log_softmax(0))


def test_a_token_that_no_member_allows_leaves_the_weights_as_they_are():
    """A processor may force one. A member that alone forbids a token loses its vote for good."""
    log_w = torch.tensor([[0.25, 0.25], [0.75, 0.75]], dtype=torch.float64).log()
    log_p = torch.tensor([[-torch.inf, -torch.inf], [-torch.inf, -1.0]], dtype=torch.float64)
    found = running_log_weights(log_w, log_p).exp()
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.0], [0.75, 1.0]], dtype=torch.float64))
    again = running_log_weights(running_log_weights(log_w, log_p), torch.zeros(2, 2, dtype=torch.float64)).exp()
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("members", [1, 3])
def test_the_logits_of_a_mixture_are_its_probabilities_and_a_mean_normaliser(members):
    logits = 4 * torch.randn(members, 2, 7, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    log_w = torch.randn(members, 2, dtype=torch.float64).log_softmax(0)
    expected = (log_w.exp()[..., None] * log_p.double().exp()).sum(0).log()
    torch.testing.assert_close(mixture_log_probs(log_p, log_w).double(), expected, atol=1e-5, rtol=0)
    mixed = mixture_logits(logits, log_p, log_w).double()
    torch.testing.assert_close(mixed.log_softmax(-1), expected, atol=1e-5, rtol=0)
    level = (log_w.exp() * logits.double().logsumexp(-1)).sum(0)
    torch.testing.assert_close(mixed.logsumexp(-1), level, atol=1e-5, rtol=0)


# What is routed


def test_length_normalised_routing_is_routing_at_a_smaller_order():
    """T loss_α(ℓ / T) = loss_{α/T}(ℓ), for every example its own T; an example without tokens counts as one of one."""
    log_likelihood = -20 * torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    tokens = torch.tensor([1, 2, 16, 0])
    given = log_likelihood, tokens, 0.8, log_weights
    loss = example_loss(*given, "length_normalised")
    shares = example_responsibilities(*given, "length_normalised")
    for i, length in enumerate((1, 2, 16, 1)):
        one = log_likelihood[:, i], 0.8 / length, log_weights
        torch.testing.assert_close(loss[i], renyi_loss(*one))
        torch.testing.assert_close(shares[:, i], responsibilities(*one))


def test_whole_examples_are_routed_by_default():
    log_likelihood, tokens = torch.tensor([[-3.0, -40.0], [-9.0, -1.0]]), torch.tensor([4, 9])
    assert torch.equal(example_loss(log_likelihood, tokens, 0.8), renyi_loss(log_likelihood, 0.8))
    shares = example_responsibilities(log_likelihood, tokens, 0.8)
    assert torch.equal(shares, responsibilities(log_likelihood, 0.8))
    with pytest.raises(ValueError, match="quantity is 'word'"):
        example_loss(log_likelihood, tokens, 0.8, quantity="word")
