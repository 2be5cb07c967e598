"""Truths about PowerFlow's loss, in a language small enough to write down: where it is 0, what its gradient finds."""

import math
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from enumerable import EOS, PADDING, enumerate_sequences, sequence_log_probs, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from renyi.objectives import (
    BALANCES,
    group_partition,
    importance_weight,
    power_next_token,
    power_target,
    trajectory_balance,
    trajectory_residual,
)

POWERS = [0.0, 0.3, 0.5, 1.0, 2.0, 4.0]
PROMPT = torch.tensor([1, 2])
properties = settings(max_examples=60, deadline=None)


class World(NamedTuple):
    """Every sequence [S, L], log-probs of its tokens [S, L], and by sequence log p, n and a random penalty ψ [S]."""

    sequences: Tensor
    token_log_base: Tensor
    log_base: Tensor
    tokens: Tensor
    penalty: Tensor


def world_of(sequences: Tensor, token_log_base: Tensor, tokens: Tensor) -> World:
    penalty = -torch.rand(len(tokens), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return World(sequences, token_log_base, token_log_base.sum(1), tokens, penalty)


@lru_cache
def llama_world(seed: int = 0, vocab_size: int = 4, max_length: int = 4) -> World:
    sequences, tokens = enumerate_sequences(vocab_size, max_length)
    with torch.no_grad():
        token_log_base = sequence_log_probs(tiny_llama(vocab_size, seed), PROMPT, sequences)
    return world_of(sequences, token_log_base, tokens)


def memoryless_world(probs: list[float], max_length: int) -> World:
    """Each token by itself, `probs` being those of the end and of the words."""
    sequences, tokens = enumerate_sequences(len(probs), max_length)
    logs = torch.tensor([*probs, 1.0], dtype=torch.float64).log()  # index −1, of padding, has log 1
    return world_of(sequences, logs[sequences], tokens)


def mean_length(log_probs: Tensor, tokens: Tensor) -> float:
    return (log_probs.exp() * tokens).sum().item()


def entropy(log_probs: Tensor) -> float:
    return -(log_probs.exp() * log_probs).sum().item()


def total_variation(log_p: Tensor, log_q: Tensor) -> float:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum().item()


# The language itself


@pytest.mark.parametrize(("vocab_size", "max_length"), [(2, 1), (2, 5), (3, 4), (5, 3)])
def test_every_sequence_is_there_once(vocab_size, max_length):
    sequences, tokens = enumerate_sequences(vocab_size, max_length)
    words = vocab_size - 1
    assert len(sequences) == sum(words**n for n in range(max_length)) + words**max_length
    assert len(sequences.unique(dim=0)) == len(sequences)
    for row, n in zip(sequences.tolist(), tokens.tolist(), strict=True):
        assert EOS not in row[: n - 1]
        assert PADDING not in row[:n]
        assert row[n:] == [PADDING] * (max_length - n)
        assert n == max_length or row[n - 1] == EOS


def test_the_base_is_a_distribution_with_preferences():
    world = llama_world()
    assert world.log_base.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    first = sequence_log_probs(tiny_llama(4), PROMPT, torch.arange(4).unsqueeze(1)).exp()
    assert first.max() > 2 * first.min()
    alone = sequence_log_probs(tiny_llama(4), PROMPT, torch.tensor([[3, 0]]))  # without what pads it elsewhere
    row = (world.sequences == torch.tensor([3, 0, PADDING, PADDING])).all(1)
    torch.testing.assert_close(world.token_log_base[row], torch.cat([alone, torch.zeros(1, 2)], 1), rtol=1e-5, atol=0)


# The formulas, by hand


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        ("length_aware", 0.25 - 6.0 / 3 + 2.0 * (9.0 / 3 + 0.5)),
        ("trajectory", 0.25 - 6.0 + 2.0 * (9.0 + 3 * 0.5)),
        ("token_mean", 0.25 - 6.0 + 2.0 * (9.0 / 3 + 0.5)),
    ],
)
def test_residuals_by_hand(balance, expected):
    log_policy, log_base, tokens = torch.tensor([-6.0]), torch.tensor([-9.0]), torch.tensor([3])
    arguments = (log_policy, log_base, tokens, torch.tensor(0.25), 2.0, torch.tensor([-0.5]), balance)
    assert trajectory_residual(*arguments).item() == pytest.approx(expected)
    assert trajectory_balance(*arguments).item() == pytest.approx(expected**2)
    assert trajectory_balance(*arguments, weight=torch.tensor([0.1])).item() == pytest.approx(0.1 * expected**2)


# The target in closed form


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_residual_is_zero_at_the_target_and_nowhere_else(seed, power, penalised, balance):
    world = llama_world(seed)
    penalty = world.penalty if penalised else None
    target = power_target(world.log_base, world.tokens, power, penalty, balance)
    assert target.log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-10)

    def residual(log_policy: Tensor, log_partition: Tensor) -> Tensor:
        return trajectory_residual(log_policy, world.log_base, world.tokens, log_partition, power, penalty, balance)

    assert residual(target.log_probs, target.log_partition).abs().max() < 1e-12
    # At any other log Z', the only policy without residuals is not a distribution.
    for elsewhere in (-0.1, 0.1):
        scale = world.tokens.double() if balance == "length_aware" else 1.0
        shifted = target.log_probs - elsewhere * scale
        assert residual(shifted, target.log_partition + elsewhere).abs().max() < 1e-12
        assert abs(shifted.exp().sum().item() - 1.0) > 0.05


def test_power_one_is_the_base_with_nothing_to_learn():
    world = llama_world()
    target = power_target(world.log_base, world.tokens, 1.0)
    assert abs(target.log_partition.item()) < 1e-9
    torch.testing.assert_close(target.log_probs, world.log_base)
    log_policy, log_partition = world.log_base.clone().requires_grad_(), torch.zeros((), requires_grad=True)
    loss = trajectory_balance(log_policy, world.log_base, world.tokens, log_partition, 1.0)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), (log_policy, log_partition)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("vocab_size", [3, 4, 5])
def test_power_zero_is_uniform_over_next_tokens(vocab_size):
    """In a language cut off at a length, too: at each node V tokens of e^−λ = 1/V share all that arrives there."""
    world = llama_world(0, vocab_size, 4)
    target = power_target(world.log_base, world.tokens, 0.0)
    assert target.log_partition.item() == pytest.approx(math.log(vocab_size), abs=1e-12)
    torch.testing.assert_close(target.log_probs, -world.tokens.double() * math.log(vocab_size))


@pytest.mark.parametrize("power", POWERS)
def test_a_memoryless_base_only_changes_temperature(power):
    """Exact in a cut language: Σ_v p(v)^power e^−λ = 1 at every node alike."""
    probs = [0.3, 0.5, 0.15, 0.05]
    world, powered = memoryless_world(probs, 5), [p**power for p in probs]
    target = power_target(world.log_base, world.tokens, power)
    assert target.log_partition.item() == pytest.approx(math.log(sum(powered)), abs=1e-12)
    at_temperature = memoryless_world([p / sum(powered) for p in powered], 5)
    torch.testing.assert_close(target.log_probs, at_temperature.log_base)


def test_what_each_balance_does_to_length():
    """At power 4, plain trajectory balance collapses to short sequences, the mean per token runs on to the longest."""
    world = memoryless_world([0.3, 0.5, 0.2], 7)
    length = {
        name: mean_length(power_target(world.log_base, world.tokens, 4.0, balance=name).log_probs, world.tokens)
        for name in BALANCES
    }
    at_base = mean_length(world.log_base, world.tokens)
    assert length["trajectory"] < 1.1 < at_base < length["length_aware"] < length["token_mean"]
    torch.testing.assert_close(
        power_target(world.log_base, world.tokens, 4.0, balance="trajectory").log_probs,
        (4.0 * world.log_base).log_softmax(0),
    )


@pytest.mark.parametrize("seed", range(4))
def test_log_partition_is_convex_and_entropy_by_length_falls(seed):
    """λ' = E[log p] / E[n], so that entropy / mean length = λ − power λ', of which the slope is −power λ'' ≤ 0."""
    world, powers = llama_world(seed), [0.25 * i for i in range(25)]
    targets = [power_target(world.log_base, world.tokens, power) for power in powers]
    lam = torch.stack([target.log_partition for target in targets])
    assert (lam.diff().diff() > 0).all()
    assert (lam.diff() < 0).all()
    assert (lam[torch.tensor(powers) > 1] < 0).all()
    rate = [entropy(target.log_probs) / mean_length(target.log_probs, world.tokens) for target in targets]
    assert (torch.tensor(rate).diff() < 0).all()
    for power, target, found in zip(powers, targets, rate, strict=True):
        p = target.log_probs.exp()
        slope = (p * world.log_base).sum() / (p * world.tokens).sum()
        assert found == pytest.approx((target.log_partition - power * slope).item(), abs=1e-12)


def test_entropy_of_sequences_may_rise_with_the_power():
    """Where the end is unlikely, a higher power writes longer sequences: here 1.38 nats at power 0, 2.0 at 1."""
    world = memoryless_world([0.3, 0.7], 16)
    at = [entropy(power_target(world.log_base, world.tokens, power).log_probs) for power in (0.0, 1.0, 4.0)]
    assert at[1] > 1.3 * at[0]
    assert at[1] > at[2]


@properties
@given(
    st.lists(st.tuples(st.floats(-1e4, 0.0), st.integers(1, 2000)), min_size=1, max_size=12),
    st.sampled_from(POWERS),
)
def test_log_partition_is_the_root_that_another_solver_finds(rows, power):
    """Whatever the lengths, and whether or not the base sums to 1. The root lies between f(0)/max n and f(0)/min n."""
    log_base = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    tokens = torch.tensor([row[1] for row in rows], dtype=torch.float64)

    def f(lam: float) -> float:
        return (power * log_base - lam * tokens).logsumexp(0).item()

    low, high = sorted((f(0.0) / tokens.max().item(), f(0.0) / tokens.min().item()))
    margin = 1e-6 * (1 + abs(low) + abs(high))
    expected = brentq(f, low - margin, high + margin, xtol=1e-14, rtol=1e-14)
    target = power_target(log_base, tokens, power)
    assert target.log_partition.item() == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_several_prompts_at_once():
    worlds = [llama_world(seed) for seed in (0, 1, 2)]
    log_base = torch.stack([world.log_base for world in worlds])
    for balance in BALANCES:
        together = power_target(log_base, worlds[0].tokens, 2.0, worlds[0].penalty, balance)
        for i, world in enumerate(worlds):
            alone = power_target(world.log_base, world.tokens, 2.0, worlds[0].penalty, balance)
            torch.testing.assert_close(together.log_partition[i], alone.log_partition)
            torch.testing.assert_close(together.log_probs[i], alone.log_probs)


# Next tokens of the target


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("power", POWERS)
def test_next_tokens_are_the_conditionals_of_the_target(power, penalised):
    world = llama_world()
    penalty = world.penalty if penalised else None
    target = power_target(world.log_base, world.tokens, power, penalty)
    found = power_next_token(world.sequences, world.token_log_base, power, target.log_partition, penalty)
    mass = target.log_probs.exp()
    for row, n, log_probs in zip(world.sequences, world.tokens.tolist(), found, strict=True):
        for t in range(n):
            before = (world.sequences[:, :t] == row[:t]).all(1)
            upto = (world.sequences[:, : t + 1] == row[: t + 1]).all(1)
            assert log_probs[t].item() == pytest.approx(math.log(mass[upto].sum() / mass[before].sum()), abs=1e-10)
        assert (log_probs[n:] == 0).all()


def test_the_recursion_finds_the_log_partition_by_itself():
    """The first token's probabilities sum to 1 at λ only; those of later tokens sum to 1 whatever is put for it."""
    world = llama_world()
    lam = power_target(world.log_base, world.tokens, 2.0, world.penalty).log_partition

    def sums(log_partition: Tensor) -> list[float]:
        found = power_next_token(world.sequences, world.token_log_base, 2.0, log_partition, world.penalty).exp()
        second = world.sequences[:, 0] == 3
        groups = (torch.ones_like(second), 0), (second, 1)
        return [sum(found[(world.sequences[:, t] == v) & which, t][0].item() for v in range(4)) for which, t in groups]

    assert sums(lam) == pytest.approx([1.0, 1.0], abs=1e-12)
    for elsewhere in (-0.1, 0.1):
        first, later = sums(lam + elsewhere)
        assert later == pytest.approx(1.0, abs=1e-12)
        assert abs(first - 1.0) > 0.05


@pytest.mark.parametrize("power", POWERS)
def test_what_the_base_rules_out_stays_out(power):
    world = memoryless_world([0.3, 0.7, 0.0], 4)
    smaller = memoryless_world([0.3, 0.7], 4)
    possible = world.log_base > -math.inf
    for balance in BALANCES:
        target = power_target(world.log_base, world.tokens, power, balance=balance)
        without = power_target(smaller.log_base, smaller.tokens, power, balance=balance)
        torch.testing.assert_close(target.log_partition, without.log_partition)
        torch.testing.assert_close(target.log_probs[possible], without.log_probs)
        assert (target.log_probs[~possible] == -math.inf).all()
        policy = torch.full_like(world.log_base, -math.log(len(world.tokens)))
        residual = trajectory_residual(policy, world.log_base, world.tokens, 0.0, power, balance=balance)
        assert (residual[~possible] == math.inf).all()
        assert residual[possible].isfinite().all()
    lam = power_target(world.log_base, world.tokens, power).log_partition
    found = power_next_token(world.sequences, world.token_log_base, power, lam)
    assert not found.isnan().any()
    torch.testing.assert_close(found[possible], power_next_token(smaller.sequences, smaller.token_log_base, power, lam))
    assert (found[~possible].sum(1) == -math.inf).all()


@pytest.mark.parametrize("power", POWERS)
def test_a_penalty_without_end_rules_out(power):
    """All that begins with 2, a whole branch of the tree, and one sequence beside it."""
    world = llama_world()
    out = world.sequences[:, 0] == 2
    out[3] = True
    assert not out.all()
    penalty = world.penalty.masked_fill(out, -math.inf)
    lam, log_probs = power_target(world.log_base, world.tokens, power, penalty)
    assert (log_probs[out] == -math.inf).all()
    kept = power_target(world.log_base[~out], world.tokens[~out], power, world.penalty[~out])
    torch.testing.assert_close(lam, kept.log_partition)
    torch.testing.assert_close(log_probs[~out], kept.log_probs)
    found = power_next_token(world.sequences, world.token_log_base, power, lam, penalty)
    torch.testing.assert_close(found.sum(1), log_probs)


# What gradients find


def train(world: World, power: float, partition: str | float, steps: int = 3000) -> Tensor:
    """log π [S] of a softmax over all sequences, after Adam on the exact expected gradient of its own trajectories.

    Trajectories are weighed by their detached probability, as they are when they are sampled.
    """
    logits = torch.zeros_like(world.log_base, requires_grad=True)
    learned = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits, learned], lr=0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        log_policy = logits.log_softmax(0)
        probability = log_policy.detach().exp()
        log_partition = learned if partition == "learned" else partition
        if partition == "mean":  # of infinitely many rollouts
            residual = trajectory_residual(log_policy.detach(), world.log_base, world.tokens, 0.0, power)
            log_partition = -(probability * residual).sum()
        arguments = (log_policy, world.log_base, world.tokens, log_partition, power)
        optimiser.zero_grad()
        trajectory_balance(*arguments, weight=probability).sum().backward()
        optimiser.step()
        schedule.step()
    return logits.detach().log_softmax(0)


def length_tilt(world: World, power: float, frozen: float) -> Tensor:
    """log π [S] at which the expected on-policy gradient is 0 while log Z' is frozen at c.

    With residual δ(y) = c + (log π(y) − power log p(y)) / n, the gradient by the logit of y is, since
    ∂ log π(y') / ∂ logit(y) = [y = y'] − π(y),

        Σ_y' π(y') 2 δ(y')/n' ([y = y'] − π(y)) = 2 π(y) (δ(y)/n − E[δ/n])

    which is 0 for every y if and only if δ/n is one number κ:

        log π(y) = power log p(y) − c n + κ n²

    with κ from Σ π = 1: a quadratic tilt towards long (c > λ) or short sequences (c < λ), none at c = λ. Were log Z'
    learned, or the mean, E[δ] = κ E[n] would be 0, too, and so κ.
    """
    n = world.tokens.double()

    def log_policy(kappa: float) -> Tensor:
        return power * world.log_base - frozen * n + kappa * n**2

    return log_policy(brentq(lambda kappa: log_policy(kappa).logsumexp(0).item(), -20.0, 20.0, xtol=1e-14))


@pytest.mark.parametrize("power", [0.5, 2.0])
@pytest.mark.parametrize("partition", ["learned", "mean"])
def test_training_finds_the_target(partition, power):
    world = llama_world(0, 3, 4)
    assert total_variation(train(world, power, partition), power_target(world.log_base, world.tokens, power)[1]) < 1e-4


@pytest.mark.parametrize("power", [0.5, 2.0])
@pytest.mark.parametrize("off", [-0.4, 0.0, 0.4])
def test_a_frozen_partition_tilts_lengths_by_their_square(off, power):
    world = llama_world(0, 3, 4)
    target = power_target(world.log_base, world.tokens, power)
    tilted = length_tilt(world, power, target.log_partition.item() + off)
    found = train(world, power, target.log_partition.item() + off)
    assert total_variation(found, tilted) < 1e-4
    if off == 0.0:
        assert total_variation(tilted, target.log_probs) < 1e-9
    else:
        assert total_variation(found, target.log_probs) > 0.02
        longer = mean_length(found, world.tokens) - mean_length(target.log_probs, world.tokens)
        assert math.copysign(1.0, longer) == math.copysign(1.0, off)


def test_on_policy_the_group_gradient_is_twice_grpos():
    """Equal for every parameter of a model, over 3 groups of 4 of its own trajectories."""
    policy, base, group_size, power = tiny_llama(5, seed=0).double(), tiny_llama(5, seed=1).double(), 4, 3.0
    every, tokens = enumerate_sequences(5, 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        probability = sequence_log_probs(policy, PROMPT, every).sum(1).exp()
    rollouts = torch.multinomial(probability, 12, replacement=True, generator=generator)
    sequences, tokens = every[rollouts], tokens[rollouts]
    assert tokens.unique().numel() > 2
    penalty = -torch.rand(12, generator=generator, dtype=torch.float64)
    token_log_policy = sequence_log_probs(policy, PROMPT, sequences)
    with torch.no_grad():
        log_base = sequence_log_probs(base, PROMPT, sequences).sum(1)
    log_policy = token_log_policy.sum(1)

    partition = group_partition(log_policy, log_base, tokens, group_size, power, penalty)
    ours = trajectory_balance(log_policy, log_base, tokens, partition, power, penalty).mean()

    # GRPO (Shao et al. 2024) with loss_type "grpo", rewards unscaled and no KL penalty.
    reward = power * (log_base / tokens + penalty) - log_policy.detach() / tokens
    groups = reward.view(-1, group_size)
    advantage = (groups - groups.mean(1, keepdim=True)).flatten()
    ratio = (token_log_policy - token_log_policy.detach()).exp()
    surrogate = advantage.unsqueeze(1) * ratio * (sequences != PADDING)
    grpo = -(surrogate.sum(1) / tokens).mean()

    found = torch.autograd.grad(ours, list(policy.parameters()), retain_graph=True)
    expected = torch.autograd.grad(grpo, list(policy.parameters()))
    assert max(gradient.abs().max().item() for gradient in expected) > 0.1
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, 2 * right, rtol=1e-8, atol=1e-10)


# Groups


@pytest.mark.parametrize("balance", BALANCES)
def test_at_the_target_every_group_finds_the_partition(balance):
    world = llama_world()
    target = power_target(world.log_base, world.tokens, 2.0, world.penalty, balance)
    rollouts = torch.multinomial(target.log_probs.exp(), 24, generator=torch.Generator().manual_seed(0))
    arguments = (
        target.log_probs[rollouts], world.log_base[rollouts], world.tokens[rollouts], 6, 2.0, world.penalty[rollouts],
    )  # fmt: skip
    found = group_partition(*arguments, balance)
    torch.testing.assert_close(found, target.log_partition.expand(24))


def test_a_collapsed_policy_pays_nothing_on_its_own_trajectories():
    """Loss 0 does not prove convergence; its log Z' does the contrary: it is not λ."""
    world = llama_world()
    target = power_target(world.log_base, world.tokens, 2.0)
    row = torch.tensor([7] * 4)
    always = torch.zeros(4, dtype=torch.float64)  # log π of the one sequence that it writes
    partition = group_partition(always, world.log_base[row], world.tokens[row], 4, 2.0)
    loss = trajectory_balance(always, world.log_base[row], world.tokens[row], partition, 2.0)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert abs(partition[0] - target.log_partition) > 0.1


@st.composite
def rollouts(draw) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """log π [M, B], log p [B], n [B], ψ [B] and the size of a group."""
    members, groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 10.0, 1000.0]))
    log_policy = -scale * torch.rand(members, groups * size, generator=generator, dtype=torch.float64)
    log_base = -scale * torch.rand(groups * size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 300, (groups * size,), generator=generator)
    penalty = -torch.rand(groups * size, generator=generator, dtype=torch.float64)
    return log_policy, log_base, tokens, penalty, size


@properties
@given(rollouts(), st.sampled_from(POWERS), st.sampled_from(BALANCES), st.floats(-50.0, 50.0))
def test_groups_see_deviations_only(drawn, power, balance, shift):
    """Residuals sum to 0 by group, and are blind to what all of a group gain alike."""
    log_policy, log_base, tokens, penalty, size = drawn

    def residual(log_policy: Tensor) -> Tensor:
        partition = group_partition(log_policy, log_base, tokens, size, power, penalty, balance)
        assert partition.shape == log_policy.shape
        return trajectory_residual(log_policy, log_base, tokens, partition, power, penalty, balance)

    close = {"rtol": 0.0, "atol": 1e-9 * (1 + log_policy.abs().max().item() + log_base.abs().max().item())}
    found = residual(log_policy)
    sums = found.unflatten(-1, (-1, size)).sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), **close)
    scale = tokens.double() if balance == "length_aware" else 1.0
    torch.testing.assert_close(residual(log_policy + shift * scale), found, **close)


@properties
@given(rollouts(), st.sampled_from(POWERS), st.sampled_from(BALANCES))
def test_members_are_computed_as_if_alone(drawn, power, balance):
    log_policy, log_base, tokens, penalty, size = drawn
    partition = group_partition(log_policy, log_base, tokens, size, power, penalty, balance)
    loss = trajectory_balance(log_policy, log_base, tokens, partition, power, penalty, balance)
    assert loss.shape == log_policy.shape
    for m in range(len(log_policy)):
        alone = group_partition(log_policy[m], log_base, tokens, size, power, penalty, balance)
        assert torch.equal(alone, partition[m])
        expected = trajectory_balance(log_policy[m], log_base, tokens, alone, power, penalty, balance)
        assert torch.equal(expected, loss[m])


def test_what_is_detached_and_what_is_not():
    log_policy, log_base = (torch.tensor([-3.0, -5.0], requires_grad=True) for _ in range(2))
    tokens, log_partition = torch.tensor([2, 4]), torch.zeros(2, requires_grad=True)
    residual = trajectory_residual(log_policy, log_base, tokens, log_partition, 2.0)
    for wanted, found in zip(
        ([0.5, 0.25], [-1.0, -0.5], [1.0, 1.0]),
        torch.autograd.grad(residual.sum(), (log_policy, log_base, log_partition)),
        strict=True,
    ):
        torch.testing.assert_close(found, torch.tensor(wanted))
    assert not group_partition(log_policy, log_base, tokens, 2, 2.0).requires_grad
    assert not importance_weight(log_policy, log_base, 0.5, 2.0).weight.requires_grad
    assert not power_target(log_base, tokens, 2.0).log_probs.requires_grad


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_anything_is_rounded(dtype, balance):
    log_policy, log_base = (-50 * torch.rand(2, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    tokens, penalty = torch.tensor([3, 7, 9, 11]), torch.rand(4)
    raised, base = log_policy.float(), log_base.float()
    found = trajectory_residual(log_policy, log_base, tokens, 0.1, 3.0, penalty, balance)
    assert torch.equal(found, trajectory_residual(raised, base, tokens, 0.1, 3.0, penalty, balance))
    found = group_partition(log_policy, log_base, tokens, 2, 3.0, penalty, balance)
    assert torch.equal(found, group_partition(raised, base, tokens, 2, 3.0, penalty, balance))
    found = importance_weight(log_policy, log_base, 0.0, 1e9).weight
    assert torch.equal(found, importance_weight(raised, base, 0.0, 1e9).weight)


# Importance weights


@properties
@given(
    st.lists(st.tuples(st.floats(-1e5, 0.0), st.floats(-1e5, 0.0)), min_size=1, max_size=8),
    st.floats(0.0, 1.0),
    st.floats(1.0, 1e6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_importance_weights_keep_their_bounds(pairs, low, high, dtype):
    log_policy, log_behaviour = torch.tensor(pairs, dtype=dtype).T
    found = importance_weight(log_policy, log_behaviour, low, high)
    bounds = torch.tensor([low, high], dtype=dtype)
    assert ((found.weight >= bounds[0]) & (found.weight <= bounds[1])).all()
    difference = (log_policy - log_behaviour).double()
    inside = (difference > math.log(low or 1e-300) + 1e-4) & (difference < math.log(high) - 1e-4)
    torch.testing.assert_close(found.weight[inside], difference[inside].exp().to(dtype), rtol=1e-4, atol=0.0)
    assert not found.is_clipped[inside].any()
    outside = (difference < math.log(low or 1e-300) - 1e-4) | (difference > math.log(high) + 1e-4)
    assert found.is_clipped[outside & (found.weight > 0)].all()
    assert found.is_clipped.dtype == torch.bool


def test_on_policy_the_weight_is_exactly_one():
    log_policy = -1e5 * torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    weight, is_clipped = importance_weight(log_policy, log_policy.clone(), 1.0, 1.0)
    assert torch.equal(weight, torch.ones(3, 50))
    assert not is_clipped.any()
    far, none = torch.tensor([1e4, -1e4]), torch.zeros(2)
    assert importance_weight(far, none, 0.5, 2.0).weight.tolist() == [2.0, 0.5]
    assert importance_weight(far, none, 0.5, 2.0).is_clipped.tolist() == [True, True]


# What is refused


@pytest.mark.parametrize("power", [-0.1, math.nan, math.inf])
def test_a_power_below_zero_or_without_end_is_refused(power):
    values, tokens = torch.tensor([-3.0, -5.0]), torch.tensor([2, 4])
    for call in (
        lambda: trajectory_residual(values, values, tokens, 0.0, power),
        lambda: trajectory_balance(values, values, tokens, 0.0, power),
        lambda: group_partition(values, values, tokens, 2, power),
        lambda: power_target(values, tokens, power),
        lambda: power_next_token(torch.tensor([[0], [1]]), values.unsqueeze(1), power, 0.0),
    ):
        with pytest.raises(ValueError, match="power is"):
            call()


def test_what_else_is_refused():
    values, tokens = torch.tensor([-3.0, -5.0]), torch.tensor([2, 4])
    with pytest.raises(ValueError, match=r"unknown balance 'tokens'; one of length_aware, trajectory"):
        trajectory_residual(values, values, tokens, 0.0, 2.0, balance="tokens")
    for size in (0, 1, 3, 4):
        with pytest.raises(ValueError, match=f"group_size {size}"):
            group_partition(values, values, tokens, size, 2.0)
    for low, high in ((1.1, 2.0), (0.5, 0.9), (-0.1, 2.0), (math.nan, 2.0)):
        with pytest.raises(ValueError, match="importance weight between"):
            importance_weight(values, values, low, high)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or inf"):
            power_target(torch.tensor([-1.0, bad]), tokens, 2.0)
        with pytest.raises(ValueError, match="NaN or inf"):
            power_target(values, tokens, 2.0, penalty=torch.tensor([bad, 0.0]))
    with pytest.raises(ValueError, match="fewer than 1 token"):
        power_target(values, torch.tensor([1, 0]), 2.0)
    with pytest.raises(ValueError, match="no sequence is possible"):
        power_target(torch.full((2,), -math.inf), tokens, 2.0)
    with pytest.raises(ValueError, match="occurs twice"):
        power_next_token(torch.tensor([[1, 0], [1, 0]]), torch.zeros(2, 2), 2.0, 0.0)
