"""Langevin members sample a Gaussian posterior in closed form; a trainer's are the same after a kill."""

import math

import pytest
import torch
from float64 import SAME
from processes import KILLED, interrupted_run, run
from test_resume import assert_equal_runs
from tiny import lora, member_distance, scatter_members, tiny_model, trainer_of

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.training.langevin import add_noise

QUICK = {"num_members": 2, "member_kind": "langevin", "max_steps": 8, "alpha": 0.0, "adam_epsilon": 1.0}


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.02), 500),
        (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.0, 0.999)), 1500),
    ],
    ids=["sgd", "adamw"],
)
def test_chains_on_a_gaussian_posterior_reach_its_mean_and_variance(make, steps):
    """p_θ = N(θ, 1), N data, prior N(0, σ₀²): N(Σx/(N + 1/σ₀²), 1/(N + 1/σ₀²)), by 2,000 chains.

    Adam's momentum is off. With it a chain follows gradients of about nine steps ago, which widens it by about nine
    times the share that it forgets in a step.
    """
    x, prior_std = torch.tensor([0.4, 1.9, 2.2, 1.1, 3.0], dtype=torch.float64), 0.7
    precision = len(x) + 1 / prior_std**2
    theta = torch.nn.Parameter(torch.zeros(2000, 1, dtype=torch.float64))
    optimizer, generator = make([theta]), torch.Generator().manual_seed(0)
    means, variances = [], []
    for step in range(steps):
        # ∇U/N, where U = Σ_i (x_i − θ)²/2 + θ²/(2 σ₀²)
        theta.grad = (precision * theta.detach() - x.sum()) / len(x)
        optimizer.step()
        add_noise(optimizer, 1 / len(x), generator)
        if step >= steps // 2 and step % 10 == 0:
            means.append(theta.mean().item())
            variances.append(theta.var().item())
    assert sum(means) / len(means) == pytest.approx(float(x.sum()) / precision, rel=0.02)
    assert sum(variances) / len(variances) == pytest.approx(1 / precision, rel=0.05)


def test_at_temperature_zero_it_is_the_run_of_points(tmp_path):
    points = trainer_of(tmp_path / "points", **{**QUICK, "member_kind": "point"})
    cold = trainer_of(tmp_path / "cold", **QUICK, langevin_temperature=0.0)
    warm = trainer_of(tmp_path / "warm", **QUICK, langevin_temperature=1.0)
    for trainer in (points, cold, warm):
        trainer.train()
    assert member_distance(cold.model, points.model) == 0
    assert member_distance(warm.model, points.model) > 1e-3


def test_noise_has_the_size_of_the_step_and_members_have_their_own(tmp_path):
    """One step of SGD at rate η adds a variance of 2ηT/N, N the trained tokens."""
    noise = []
    for temperature in (0.0, 4.0):
        trainer = trainer_of(
            tmp_path / str(temperature),
            **{**QUICK, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0},
            langevin_temperature=temperature,
        )
        trainer.train()
        noise.append([p.detach().clone() for p in trainer.model.stack.parameters()])
    added = torch.cat([(q - p).flatten(1) for p, q in zip(*noise, strict=True)], dim=1)
    expected = math.sqrt(2 * 0.1 * 4.0 / trainer.loss_units())
    assert added.std().item() == pytest.approx(expected, rel=0.05)
    assert torch.corrcoef(added)[0, 1].abs() < 0.1


@pytest.mark.usefixtures("float64")
def test_micro_batches_get_one_noise_a_step(tmp_path):
    whole = trainer_of(tmp_path / "whole", **QUICK, per_device_train_batch_size=4)
    cut = trainer_of(tmp_path / "cut", **QUICK, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for trainer in (whole, cut):
        trainer.train()
    assert member_distance(cut.model, whole.model) <= SAME


@pytest.mark.usefixtures("float64")
def test_permuting_members_and_their_noise_permutes_everything(tmp_path, monkeypatch):
    """The noise belongs to a place, so members that change places change their noise: it is permuted, too."""
    order, plain, ends = [1, 2, 0], torch.randn, []
    for name, members in (("plain", [0, 1, 2]), ("permuted", order)):
        start = scatter_members(LoraEnsemble.from_base(tiny_model(), 3, lora(), seed=7, member_kind="langevin"))
        start.stack.keep(members)
        settings = {**QUICK, "num_members": 3, "alpha": 0.8, "alpha_hold_ratio": 0.0, "max_steps": 4}
        trainer = trainer_of(tmp_path / name, model=start, **settings)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda shape, of=members, **how: plain(shape, **how)[of])
            trainer.train()
        ends.append(trainer.model)
    assert member_distance(ends[1], ends[0], list(enumerate(order))) <= SAME
    assert member_distance(ends[1], ends[0], [(0, 0)]) > 0.1


@pytest.mark.slow  # the resume of random members is tested in test_random_members.py
def test_resuming_after_a_kill_changes_nothing(tmp_path):
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    settings = {"member_kind": "langevin", "keep_snapshots": 2, "optim": "sgd"}
    assert run(interrupted_run, str(expected), None, "sft", settings) == [0]
    assert run(interrupted_run, str(killed), ("between micro-batches", 5), "sft", settings) == [KILLED]
    assert run(interrupted_run, str(killed), None, "sft", settings) == [0]
    assert_equal_runs(killed, expected)
    assert len(LoraEnsemble.load(killed, base=tiny_model()).weights) == 6


def test_snapshots_along_the_way_become_members(tmp_path):
    trainer = trainer_of(tmp_path, **QUICK, keep_snapshots=2)
    trainer.train()
    trainer.save_model()
    kept = LoraEnsemble.load(tmp_path, base=tiny_model())
    assert (kept.num_members, kept.stack.kind) == (6, "point")
    torch.testing.assert_close(kept.weights, torch.full((6,), 1 / 6))
    assert member_distance(kept, trainer.model, [(0, 0), (1, 1)]) == 0
    assert sorted(folder.name for folder in (tmp_path / "snapshots").iterdir()) == ["step_4", "step_6"]
    half = LoraEnsemble.load(tmp_path / "snapshots" / "step_4", base=tiny_model())
    assert member_distance(kept, half, [(2, 0), (3, 1)]) == 0
    assert member_distance(kept, half, [(0, 0)]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"keep_snapshots": 2, "member_kind": "point"}, "keep_snapshots"),
        ({"keep_snapshots": -1}, "keep_snapshots"),
        ({"langevin_temperature": -1.0}, "langevin_temperature"),
        ({"optim": "adafactor"}, "optim"),
        ({"num_draws": 2}, "num_draws"),
        ({"adam_epsilon": 1e-8}, "adam_epsilon"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_by_key(tmp_path, settings, key):
    with pytest.raises(ConfigError) as refused:
        trainer_of(tmp_path, peft_config=lora(), **{**QUICK, **settings})
    assert refused.value.where == key
