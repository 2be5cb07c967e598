"""Truths about token uncertainty: sums over every token and pair of members, and cases known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from renyi.measures import (
    TokenUncertainty,
    draw_uncertainty,
    log_likelihood_spread,
    responsibility_entropy,
    token_uncertainty,
    uncertainty,
)
from renyi.objectives import effective_members, responsibilities

properties = settings(max_examples=60, deadline=None)

# Some zeros, some ties, some near-certainty: what log-probabilities of real vocabularies hold.
odds = st.sampled_from([0.0, 1e-300, 1e-12, 1.0, 2.0]) | st.floats(1e-6, 1.0)


@st.composite
def ensembles(draw, odds=odds) -> tuple[Tensor, Tensor]:
    """log_probs [M, V] and log_weights [M]."""
    members, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = [
        draw(st.lists(odds, min_size=vocabulary, max_size=vocabulary).filter(lambda row: sum(row) > 0))
        for _ in range(members)
    ]
    probs = torch.tensor(rows, dtype=torch.float64)
    logs = draw(st.lists(st.floats(-5.0, 5.0), min_size=members, max_size=members))
    return (probs / probs.sum(-1, keepdim=True)).log(), torch.tensor(logs, dtype=torch.float64)


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def kl(p: list[float], q: list[float]) -> float:
    """KL(p ‖ q), which is infinite where q rules out what p allows."""
    if any(x > 0 and y == 0 for x, y in zip(p, q, strict=True)):
        return math.inf
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True) if x > 0)


def by_enumeration(log_probs: Tensor, log_weights: Tensor) -> TokenUncertainty:
    """The definitions, over every member, pair and token, for log_probs [M, V]."""
    p, w = log_probs.exp().tolist(), log_weights.softmax(0).tolist()
    mixture = [sum(w[m] * p[m][v] for m in range(len(w))) for v in range(len(p[0]))]
    votes = [row.index(max(row)) for row in p]
    return TokenUncertainty(
        total=entropy(mixture),
        aleatoric=sum(a * entropy(row) for a, row in zip(w, p, strict=True)),
        epistemic=sum(a * kl(row, mixture) for a, row in zip(w, p, strict=True)),
        expected_pairwise_kl=sum(
            a * b * kl(x, y) for a, x in zip(w, p, strict=True) for b, y in zip(w, p, strict=True)
        ),
        reverse_mi=sum(a * kl(mixture, row) for a, row in zip(w, p, strict=True)),
        variation_ratio=1 - max(sum(a for a, u in zip(w, votes, strict=True) if u == v) for v in votes),
    )


def random_log_probs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


@properties
@given(ensembles())
def test_equals_the_sums_over_every_pair_and_token(ensemble):
    for ours, theirs in zip(token_uncertainty(*ensemble), by_enumeration(*ensemble), strict=True):
        assert ours.item() == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@properties
@given(ensembles())
def test_the_identities_and_bounds(ensemble):
    log_probs, log_weights = ensemble
    u = token_uncertainty(log_probs, log_weights)
    assert u.total.item() == pytest.approx((u.aleatoric + u.epistemic).item(), rel=1e-9, abs=1e-12)
    assert 0 <= u.epistemic <= entropy(log_weights.softmax(0).tolist()) + 1e-12
    assert -1e-12 <= u.total <= math.log(log_probs.shape[-1]) + 1e-12
    assert 0 <= u.variation_ratio <= 1 - 1 / len(log_weights) + 1e-12
    # Every pair differs at least as much as every member does from the mixture.
    assert u.expected_pairwise_kl >= u.epistemic


@properties
@given(ensembles(odds=st.floats(1e-6, 1.0)))
def test_the_expected_pairwise_kl_of_the_design(ensemble):
    """−Σ_v p̄ (Σ_m w_m log p_m) − aleatoric, where every member allows every token."""
    log_probs, log_weights = ensemble
    u, w = token_uncertainty(log_probs, log_weights), log_weights.softmax(0)
    cross_entropy = -((w @ log_probs.exp()) * (w @ log_probs)).sum()
    torch.testing.assert_close(u.expected_pairwise_kl, cross_entropy - u.aleatoric, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(u.reverse_mi, u.expected_pairwise_kl - u.epistemic, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("log_weights", [None, torch.tensor([0.3, -2.0, 1.1])])
@pytest.mark.parametrize("ruled_out", [0, 5])
def test_members_that_agree_have_no_disagreement_at_all(log_weights, ruled_out):
    logits = random_log_probs(1, 4, 50)
    logits[..., :ruled_out] = -math.inf
    log_probs = logits.log_softmax(-1).expand(3, 4, 50)
    u = token_uncertainty(log_probs, log_weights)
    for disagreement in (u.epistemic, u.expected_pairwise_kl, u.reverse_mi, u.variation_ratio):
        assert torch.equal(disagreement, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(u.total, u.aleatoric, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(u.total, torch.distributions.Categorical(logits=log_probs[0]).entropy())


def test_no_divergence_is_negative_by_rounding():
    log_probs = (random_log_probs(1, 5_000, 6) + 1e-9 * random_log_probs(3, 5_000, 6, seed=1)).log_softmax(-1)
    u = token_uncertainty(log_probs)
    assert (u.epistemic >= 0).all()
    assert (u.reverse_mi >= 0).all()


@pytest.mark.parametrize("members", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens_each", [1, 3])
def test_members_with_no_token_in_common(members, tokens_each):
    """Knowing the token tells the member: mutual information log M, and any pair is infinitely apart."""
    p = torch.eye(members, dtype=torch.float64).repeat_interleave(tokens_each, 1) / tokens_each
    u = token_uncertainty(p.log())
    expected = [
        math.log(members * tokens_each),
        math.log(tokens_each),
        math.log(members),
        math.inf if members > 1 else 0.0,
        math.inf if members > 1 else 0.0,
        1 - 1 / members,
    ]
    assert [value.item() for value in u] == pytest.approx(expected, abs=1e-14)


def test_two_biased_coins_by_hand():
    """p₁ = (¾, ¼), p₂ = (¼, ¾): the mixture is a fair coin."""
    u = token_uncertainty(torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64).log())
    doubt = 2 * math.log(2) - 0.75 * math.log(3)
    assert u.total.item() == pytest.approx(math.log(2))
    assert u.aleatoric.item() == pytest.approx(doubt)
    assert u.epistemic.item() == pytest.approx(math.log(2) - doubt)
    assert u.expected_pairwise_kl.item() == pytest.approx(0.25 * math.log(3))  # ½ of the pairs, KL ½ log 3
    assert u.reverse_mi.item() == pytest.approx(0.5 * math.log(4 / 3))
    assert u.variation_ratio.item() == 0.5


def test_votes_are_weighted():
    likeliest = torch.tensor([0, 1, 1, 2])
    log_probs = torch.full((4, 3), math.log(0.1), dtype=torch.float64)
    log_probs[torch.arange(4), likeliest] = math.log(0.8)
    weights = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    assert token_uncertainty(log_probs).variation_ratio.item() == 0.5  # token 1, two of four
    assert token_uncertainty(log_probs, weights.log()).variation_ratio.item() == pytest.approx(0.5)  # token 0
    weights = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64)
    assert token_uncertainty(log_probs, weights.log()).variation_ratio.item() == pytest.approx(0.4)


@pytest.mark.parametrize("row", [[0.25, 0.25, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
def test_a_dropped_member_has_no_say(row):
    """Not even where it alone allows a token, or rules out one that the others allow."""
    kept = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]], dtype=torch.float64).log()
    dropped = torch.tensor([row], dtype=torch.float64).log()
    for log_probs, log_weights in (
        (torch.cat([dropped, kept]), torch.tensor([-math.inf, 0.0, 0.0])),
        (torch.cat([kept, dropped]), torch.tensor([0.0, 0.0, -math.inf])),
    ):
        for ours, theirs in zip(token_uncertainty(log_probs, log_weights), token_uncertainty(kept), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("at_once", [2**17, 500, 1])  # whole, in parts of 3 and 1, position by position
def test_weights_of_each_position(at_once, monkeypatch):
    """The running weights of a sequence: each position is what it would be by itself."""
    monkeypatch.setattr(uncertainty, "CACHED", at_once)
    log_probs, log_weights = random_log_probs(3, 4, 5, 11), random_log_probs(3, 4, 5, seed=1)
    u = token_uncertainty(log_probs, log_weights)
    for b in range(4):
        for t in range(5):
            alone = token_uncertainty(log_probs[:, b, t], log_weights[:, b, t])
            for whole, part in zip(u, alone, strict=True):
                torch.testing.assert_close(whole[b, t], part)


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 7), (3, 2, 4, 7), (3, 0, 7)])
def test_one_value_for_each_position_in_float64(shape):
    for log_weights in (None, torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)):
        for value in token_uncertainty(random_log_probs(*shape).float(), log_weights):
            assert value.shape == shape[1:-1]
            assert value.dtype == torch.float64


def test_permuting_members_changes_nothing():
    log_probs, log_weights, order = (
        random_log_probs(4, 6, 9),
        torch.tensor([0.0, 1.0, -1.0, 0.5]),
        [2, 0, 3, 1],
    )
    for one, other in zip(
        token_uncertainty(log_probs, log_weights),
        token_uncertainty(log_probs[order], log_weights[order]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 5)])
def test_log_weights_of_other_members_are_refused(shape):
    with pytest.raises(ValueError, match="log_weights has shape"):
        token_uncertainty(random_log_probs(3, 4, 7), torch.zeros(shape))


# Of whole texts


def test_responsibility_entropy_by_hand():
    log_likelihood = torch.tensor([[-5.0, -5.0, 0.0], [-5.0, -5.0 - math.log(3), -900.0]])
    expected = [math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), 0.0]
    assert responsibility_entropy(log_likelihood).tolist() == pytest.approx(expected, abs=1e-6)
    weights = torch.tensor([0.25, 0.75])  # the second member's weight makes up for its likelihood
    assert responsibility_entropy(log_likelihood, weights.log())[1].item() == pytest.approx(math.log(2), abs=1e-6)
    effective = effective_members(responsibilities(log_likelihood, 1.0))
    torch.testing.assert_close(responsibility_entropy(log_likelihood).exp().float(), effective)


def test_log_likelihood_spread_by_hand():
    """ℓ per token 1, 2 and 3: a deviation of √(2/3); where all agree, however unlikely, exactly none."""
    log_likelihood = torch.tensor([[-4.0, -0.1], [-8.0, -0.1], [-12.0, -0.1]])
    spread = log_likelihood_spread(log_likelihood, torch.tensor([4, 7]))
    assert spread.dtype == torch.float64
    assert spread[0].item() == pytest.approx(math.sqrt(2 / 3))
    assert spread[1].item() == 0.0
    weights = torch.tensor([0.5, 0.5, 0.0])
    assert log_likelihood_spread(log_likelihood, 4, weights.log())[0].item() == pytest.approx(0.5)


# Members that are distributions


@given(st.data())
@properties
def test_total_uncertainty_has_three_parts_that_sum_to_it(data):
    """The parts from their definitions: entropies of draws, of each member's mixture, and of the mixture."""
    log_probs, log_weights = data.draw(ensembles())
    draws = data.draw(st.integers(1, 3))
    log_probs = log_probs.repeat_interleave(draws, dim=0).roll(1, dims=0)
    log_weights = log_weights.repeat_interleave(draws)
    parts, found = draw_uncertainty(log_probs, log_weights, draws), token_uncertainty(log_probs, log_weights)
    w, p = log_weights.softmax(0).unflatten(0, (-1, draws)), log_probs.exp().unflatten(0, (-1, draws))
    of_member = (w[..., None] * p).sum(1) / w.sum(1)[:, None]
    entropy_of_members = (w.sum(1) * torch.special.entr(of_member).sum(-1)).sum()
    torch.testing.assert_close(parts.within_members, entropy_of_members - found.aleatoric, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts.between_members, found.total - entropy_of_members, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.aleatoric + sum(parts), found.total, rtol=0, atol=1e-10)


def test_draws_that_agree_leave_all_disagreement_between_members_and_the_other_way_round():
    one, other = (torch.tensor(row, dtype=torch.float64).log() for row in ([0.9, 0.1], [0.2, 0.8]))
    between = draw_uncertainty(torch.stack([one, one, other, other]), None, 2)
    assert between.within_members == 0
    assert between.between_members > 0.1
    within = draw_uncertainty(torch.stack([one, other, one, other]), None, 2)
    assert within.between_members.abs() < 1e-15
    torch.testing.assert_close(within.within_members, between.between_members)
    unheard = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])  # a member of weight 0
    assert draw_uncertainty(torch.stack([one, one, one, other]), unheard, 2) == (0, 0)
    with pytest.raises(ValueError, match="not 3 draws"):
        draw_uncertainty(torch.stack([one, other]), None, 3)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("value", [-math.inf, math.nan, 1e300])
def test_a_dropped_member_does_not_spread(at, value):
    kept = torch.tensor([[-4.0, -0.1], [-8.0, -0.1]], dtype=torch.float64)
    ell = torch.cat([kept[:at], torch.full((1, 2), value, dtype=torch.float64), kept[at:]])
    weights = torch.full((3,), 0.5).index_fill(0, torch.tensor(at), 0.0)
    assert log_likelihood_spread(ell, torch.tensor([4, 7]), weights.log()).tolist() == pytest.approx([0.5, 0.0])


def test_members_that_agree_have_no_spread_at_all():
    """Whatever the rounding of their weights' sum."""
    ell = -100 * torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for log_weights in (None, torch.tensor([0.3, -2.0, 1.1, 0.7, 0.0])):
        spread = log_likelihood_spread(ell.expand(5, 200), 3, log_weights)
        assert torch.equal(spread, torch.zeros(200, dtype=torch.float64))
