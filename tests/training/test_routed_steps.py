"""Routing through the trainers: runs in parts, and thresholds of nothing, are the plain run."""

from pathlib import Path

import pytest
import torch
from tiny import dpo_trainer_of, logged, member_distance, powerflow_trainer_of, text_rows, tiny_model, trainer_of

from renyi import LoraEnsemble
from renyi.errors import ConfigError

RUNS = {"sft": trainer_of, "dpo": dpo_trainer_of}
# From the first step with members that differ, so that responsibilities are what is tested.
SETTINGS = {"num_members": 3, "alpha": 0.7, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "prior_std": 1.0}
# Adam divides by the root of second moments: rounding shows where a gradient is all but zero. SGD keeps it in scale.
SETTINGS |= {"optim": "sgd", "learning_rate": 0.1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trained trainer of each kind, made once."""
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = RUNS[kind](tmp_path_factory.mktemp(kind), **SETTINGS)
            made[kind].train()
        return made[kind]

    return of


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_a_run_in_parts_is_the_run_in_one(tmp_path, plain, kind, budget):
    trainer = RUNS[kind](tmp_path, token_budget=budget, **SETTINGS)
    trainer.train()
    assert member_distance(trainer.model, plain(kind).model) <= 2e-5
    for name in ("loss", "nll_mixture", "grad_norm", "entropy", "num_tokens", "effective_members"):
        if logged(plain(kind), name):
            assert logged(trainer, name) == pytest.approx(logged(plain(kind), name), rel=2e-4)


def test_parts_of_accumulated_batches_add_up(tmp_path, plain):
    given = {**SETTINGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, token_budget=40, **given)
    trainer.train()
    assert member_distance(trainer.model, plain("sft").model) <= 2e-5


@pytest.mark.parametrize("kind", RUNS)
def test_sparse_that_leaves_nothing_out_is_dense(tmp_path, plain, kind):
    trainer = RUNS[kind](tmp_path, routing="sparse", routing_threshold=1e-30, **SETTINGS)
    trainer.train()
    assert member_distance(trainer.model, plain(kind).model) <= 2e-5
    assert set(logged(trainer, "routing/active")) == {1.0}
    assert set(logged(trainer, "routing/dropped")) == {0.0}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("routing", ["sparse", "sampled", "auto"])
def test_routed_runs_log_what_they_trained(tmp_path, kind, routing):
    trainer = RUNS[kind](tmp_path, routing=routing, routing_threshold=0.3, **SETTINGS)
    trainer.train()
    active, dropped = logged(trainer, "routing/active"), logged(trainer, "routing/dropped")
    assert len(active) == 6
    assert all(1 / 3 - 1e-6 <= a <= 1 for a in active)
    assert all(0 <= d < 0.6 for d in dropped)
    if routing == "sampled":
        assert active == pytest.approx([1 / 3] * 6)
        assert set(dropped) == {0.0}


def test_a_race_scores_less_and_less(tmp_path):
    rows = text_rows(24, shortest=40, longest=60)
    given = {
        **SETTINGS,
        "max_steps": 20,
        "optim": "adamw_torch",
        "learning_rate": 2e-2,
        "alpha": 1.0,
        "prior_std": None,
    }
    trainer = trainer_of(tmp_path, rows, routing="raced", routing_threshold=0.05, **given)
    trainer.train()
    scored = logged(trainer, "routing/scored")
    assert scored[0] == 1.0  # fresh members agree, so none is behind
    assert scored[-1] < 0.9
    assert logged(trainer, "nll_mixture")[-1] < logged(trainer, "nll_mixture")[0]


def test_nothing_is_scored_to_draw_while_alpha_is_zero(tmp_path):
    given = {**SETTINGS, "alpha_hold_ratio": 1.0}
    trainer = trainer_of(tmp_path, routing="raced", **given)
    trainer.train()
    assert set(logged(trainer, "routing/scored")) == {0.0}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("routing", ["sampled", "raced", "auto"])
def test_an_interrupted_run_goes_on_as_it_would_have(tmp_path, routing, monkeypatch):
    # What a pass takes is another time each time; here it is what it is.
    monkeypatch.setattr("renyi.training.steps.time.perf_counter", iter(range(10**6)).__next__)
    given = {**SETTINGS, "routing": routing, "routing_threshold": 0.3, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", **given)
    whole.train()
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "cut" / "checkpoint-3")
    resumed = trainer_of(tmp_path / "cut", **given)
    resumed.train(resume_from_checkpoint=True)
    assert member_distance(resumed.model, whole.model) == 0
    assert logged(resumed, "routing/active")[-1] == logged(whole, "routing/active")[-1]


def test_members_are_saved_as_ever(tmp_path):
    trainer = trainer_of(tmp_path, routing="sampled", **SETTINGS)
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert member_distance(LoraEnsemble.load(tmp_path, base=tiny_model()), trainer.model) == 0


# Memory


def test_a_rehearsal_takes_the_longest_rows_and_leaves_no_trace(tmp_path):
    trainer = trainer_of(tmp_path, **SETTINGS)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert trainer.rehearse() > 10**6
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not list(Path(tmp_path).iterdir())


# What does not go together


@pytest.mark.parametrize(
    ("make", "settings", "where"),
    [
        (trainer_of, {"routing": "spars"}, "routing"),
        (trainer_of, {"routing": "sparse", "routing_threshold": 0.6}, "routing_threshold"),
        (trainer_of, {"routing": "sampled", "packing": True}, "routing"),
        (trainer_of, {"token_budget": 0}, "token_budget"),
        (dpo_trainer_of, {"routing": "raced"}, "routing"),
        (powerflow_trainer_of, {"routing": "sparse"}, "routing"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, make, settings, where):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, num_members=2, **settings)
    assert error.value.where == where
