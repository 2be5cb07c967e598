"""Where every sequence can be written down, a policy trained on its own rollouts alone is at the target."""

import math
from functools import partial

import pytest
import torch
from powered import (
    Comparison,
    language,
    lora,
    memoryless_llama,
    policies,
    target_of,
    train_and_compare,
    trainer_in,
    wide_llama,
)
from scipy.optimize import brentq
from tiny import logged, scatter_members
from torch import Tensor

from renyi import LoraEnsemble
from renyi.training import powerflow

slow = partial(pytest.param, marks=pytest.mark.slow)

# Of 4 tokens and at most 3: 40 sequences. The full languages are those of the slow test.
QUICK = {"max_length": 3, "max_steps": 100}


def assert_at_target(found: Comparison, power: float) -> None:
    assert found.total_variation < 0.01
    assert found.forward_kl < 0.01
    assert found.reverse_kl < 0.01
    assert abs(found.log_partition - found.expected) < 0.01
    assert found.slopes == pytest.approx((power, -found.expected), rel=0.05, abs=0.02)
    assert found.r2 > 0.98


@pytest.mark.parametrize(("power", "steps"), [slow(0.0, 120), slow(0.5, 120), (2.0, 100), slow(4.0, 120)])
def test_a_trained_policy_is_the_target(tmp_path, power, steps):
    trainer = trainer_in(tmp_path, wide_llama(), power=power, max_length=3, max_steps=steps)
    (found,) = train_and_compare(trainer, language(4, 3))
    assert found.distance > 0.08  # there was something to learn
    assert_at_target(found, power)
    if power == 0.0:  # λ = log V, and next tokens are uniform
        assert found.expected == pytest.approx(math.log(4))
        assert logged(trainer, "entropy")[-1] == pytest.approx(math.log(4), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("vocab_size", "max_length"), [(3, 5), (4, 4)])
def test_any_trained_policy_is_the_target(tmp_path, vocab_size, max_length, power, seed):
    settings = {"num_generations": 256, "max_steps": 300, "seed": seed}
    trainer = trainer_in(tmp_path, wide_llama(vocab_size, seed), max_length, power=power, **settings)
    (found,) = train_and_compare(trainer, language(vocab_size, max_length))
    assert_at_target(found, power)


def test_power_one_has_nothing_to_learn(tmp_path):
    ensemble = LoraEnsemble.from_base(wide_llama(), 1, lora())
    before = ensemble.snapshot()
    trainer = trainer_in(tmp_path, ensemble, power=1.0, max_length=3, max_steps=3)
    trainer.train()
    assert logged(trainer, "loss") == [0.0] * 3
    assert logged(trainer, "grad_norm") == [0.0] * 3
    assert logged(trainer, "log_partition") == [0.0] * 3
    for then, now in zip(before.layers, ensemble.snapshot().layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(then, now, strict=True))


@pytest.mark.slow
def test_a_learned_partition_leads_to_the_same_target(tmp_path):
    settings = {**QUICK, "partition": "learned"}
    (found,) = train_and_compare(trainer_in(tmp_path, wide_llama(), power=2.0, **settings), language(4, 3))
    assert_at_target(found, 2.0)


@pytest.mark.slow
def test_two_policies_that_share_rollouts_are_both_at_the_target(tmp_path):
    trainer = trainer_in(tmp_path, wide_llama(), power=2.0, num_members=2, **QUICK)
    for found in train_and_compare(trainer, language(4, 3)):
        assert_at_target(found, 2.0)


@pytest.mark.parametrize("pool", [slow("arithmetic"), slow("geometric")])
def test_the_power_of_a_pool_of_members_is_reached(tmp_path, pool):
    members = scatter_members(LoraEnsemble.from_base(wide_llama(), 3, lora(), seed=1), 0.2)
    members.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
    members.save(tmp_path / "members")
    known, power = language(4, 3), 2.0
    settings = {**QUICK, "reference": str(tmp_path / "members"), "reference_pool": pool}
    if pool == "geometric":  # a less certain target: see below about epsilon
        settings |= {"max_steps": 150, "adam_epsilon": 1e-6}
    trainer = trainer_in(tmp_path / "run", wide_llama(), power=power, **settings)

    ell_KS, weights = policies(members, known), members.weights.double()[:, None]
    pooled = (weights * ell_KS.exp()).sum(0).log() if pool == "arithmetic" else (weights * ell_KS).sum(0)
    score = trainer.base_score(known.input_ids, known.attention_mask, known.labels)[0].double()
    torch.testing.assert_close(score, pooled, rtol=1e-5, atol=1e-5)
    assert 0.5 * (ell_KS[0].exp() - ell_KS[1].exp()).abs().sum() > 0.1  # the pools are of members that differ
    (found,) = train_and_compare(trainer, known)
    assert found.distance > 0.2
    assert_at_target(found, power)


@pytest.mark.slow
def test_each_policy_goes_to_the_power_of_its_own_member(tmp_path):
    """On rollouts of both."""
    start = scatter_members(LoraEnsemble.from_base(wide_llama(), 2, lora(), seed=1), 0.2)
    known = language(4, 3)
    settings = {**QUICK, "num_members": 2, "reference_pool": "member"}
    trainer = trainer_in(tmp_path, start, power=2.0, **settings)
    targets = target_of(trainer, known).log_probs
    assert 0.5 * (targets[0].exp() - targets[1].exp()).abs().sum() > 0.1
    for found in train_and_compare(trainer, known):
        assert found.distance > 0.1
        assert found.total_variation < 0.03


@pytest.mark.slow
def test_penalties_of_form_and_length_are_in_the_target(tmp_path):
    known, power = language(4, 3), 2.0
    # An epsilon that steps fade under: at 1e-8 the policy wanders about its target by about as much as is allowed here.
    settings = {**QUICK, "format_penalty": "a", "format_penalty_size": 0.5, "length_penalty": 0.3, "adam_epsilon": 1e-6}
    trainer = trainer_in(tmp_path, wide_llama(), power=power, **settings)
    has_a = (known.sequences == 1).any(1)
    is_cut = (known.sequences != 0).all(1) & (known.tokens == 3)
    penalty = -(0.5 * ~has_a + 0.3 * is_cut).double()
    unpenalised = target_of(trainer, known).log_probs[0]
    expected = target_of(trainer, known, penalty).log_probs[0]
    assert 0.5 * (expected.exp() - unpenalised.exp()).abs().sum() > 0.1
    (found,) = train_and_compare(trainer, known, penalty)
    assert found.total_variation < 0.01
    assert found.reverse_kl < 0.01
    assert abs(found.log_partition - found.expected) < 0.01
    assert logged(trainer, "format_rate")[-1] > logged(trainer, "format_rate")[0] + 0.1


@pytest.mark.slow
def test_a_memoryless_base_only_changes_temperature(tmp_path):
    probs, known, power = torch.tensor([0.3, 0.4, 0.2, 0.1]), language(4, 3), 3.0
    trainer = trainer_in(tmp_path, memoryless_llama(probs.tolist()), power=power, **QUICK)
    logs = torch.cat([probs.log(), torch.zeros(1)]).double()  # index −1 is of padding
    (log_base,) = trainer.base_score(known.input_ids, known.attention_mask, known.labels).double()
    torch.testing.assert_close(log_base, logs[known.sequences].sum(1), rtol=1e-5, atol=1e-5)

    trainer.train()
    at_temperature = torch.cat([(power * probs.log()).log_softmax(0), torch.zeros(1)]).double()
    expected = at_temperature[known.sequences].sum(1).exp()
    (log_policy,) = policies(trainer.model, known)
    assert 0.5 * (log_policy.exp() - expected).abs().sum() < 0.01
    log_partition = sum(logged(trainer, "log_partition")[-10:]) / 10
    assert log_partition == pytest.approx((power * probs.log()).logsumexp(0).item(), abs=0.01)


@pytest.mark.parametrize("off", [-0.4, 0.4])
@pytest.mark.slow
def test_a_frozen_partition_tilts_lengths_by_their_square(tmp_path, monkeypatch, off):
    """The control: the normaliser matters. With log Z' frozen at c, log π = power · log p − c n + κ n²."""
    known, power = language(4, 3), 2.0
    trainer = trainer_in(tmp_path, wide_llama(), power=power, **QUICK)
    target, n = target_of(trainer, known), known.tokens.double()
    frozen = target.log_partition.item() + off
    monkeypatch.setattr(powerflow, "group_partition", lambda log_policy, *_: torch.full_like(log_policy, frozen))
    (log_base,) = trainer.base_score(known.input_ids, known.attention_mask, known.labels).double()

    def tilted(kappa: float) -> Tensor:
        return power * log_base - frozen * n + kappa * n**2

    expected = tilted(brentq(lambda kappa: tilted(kappa).logsumexp(0).item(), -10, 10, xtol=1e-12)).exp()
    trainer.train()
    (log_policy,) = policies(trainer.model, known)
    to_tilted, to_target = (0.5 * (log_policy.exp() - p).abs().sum() for p in (expected, target.log_probs[0].exp()))
    assert to_tilted < 0.04  # residuals do not vanish here, so gradients stay noisy
    assert to_target > 0.1


@pytest.mark.slow
def test_whole_trajectories_collapse_in_length_where_the_length_aware_loss_does_not(tmp_path):
    """The base ends with probability 0.15 and has five words; at most 12 tokens, power 4."""
    lengths = {}
    for balance in ("length_aware", "trajectory", "token_mean"):
        model = memoryless_llama([0.15, 0.20, 0.18, 0.17, 0.16, 0.14])
        settings = {"num_generations": 64, "max_steps": 25, "balance": balance}
        trainer = trainer_in(tmp_path / balance, model, 12, power=4.0, **settings)
        trainer.train()
        lengths[balance] = sum(logged(trainer, "completions/mean_length")[-5:]) / 5
    at_base = (1 - 0.85**12) / 0.15
    end = 0.15**4 / sum(p**4 for p in (0.15, 0.20, 0.18, 0.17, 0.16, 0.14))
    assert lengths["trajectory"] < 1.5 < at_base
    assert lengths["length_aware"] == pytest.approx((1 - (1 - end) ** 12) / end, rel=0.15)
    assert lengths["token_mean"] > 11
