"""Random members train as points do where nothing is random, and noise is the same wherever it is made."""

import json
from functools import partial

import pytest
import torch
from float64 import SAME
from processes import KILLED, distributed_run, free_port, interrupted_run, read_log, run
from test_member_parallel import SETTINGS as SETTINGS_OF_A_MESH
from test_member_parallel import TWO, Job, assert_same_runs, train, train_together
from test_resume import assert_equal_runs
from test_trl import SETTINGS, assert_equal_curves, trl_run
from tiny import (
    adapter_distance,
    dpo_trainer_of,
    kto_trainer_of,
    logged,
    lora,
    member_distance,
    padded_batch,
    pair_rows,
    powerflow_trainer_of,
    scatter_members,
    sft_config,
    text_rows,
    thumb_rows,
    tiny_model,
    trainer_of,
)

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.routing import Router, RoutingPlan
from renyi.routing.race import race

pytestmark = pytest.mark.usefixtures("float64")
slow = partial(pytest.param, marks=pytest.mark.slow)

TRAINERS = {
    "sft": (trainer_of, text_rows),
    "dpo": (dpo_trainer_of, pair_rows),
    "kto": (kto_trainer_of, thumb_rows),
}
RANDOM = {"member_kind": "gaussian", "initial_std": 0.1, "prior_std": 0.5, "std_learning_rate": 0.05}
WALSH_HADAMARD = {**RANDOM, "member_kind": "walsh_hadamard"}
PARTING = {"alpha": 0.8, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.5, "learning_rate": 2e-2, "max_steps": 6}


def trained(folder, method="sft", **settings):
    trainer_of, rows = TRAINERS[method]
    trainer = trainer_of(folder, rows(32), **{"num_members": 2, **PARTING, **settings})
    trainer.train()
    return trainer


def assert_same(one, two, among=SAME):
    """Equal means, spreads and logs."""
    assert member_distance(one.model, two.model) <= among
    for layer, other in zip(one.model.stack.layers.values(), two.model.stack.layers.values(), strict=True):
        for name in layer.members.spreads:
            torch.testing.assert_close(
                getattr(layer.members, name), getattr(other.members, name), rtol=among, atol=among
            )
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), rel=among)


@pytest.mark.parametrize("method", TRAINERS)
def test_without_spread_a_gaussian_run_is_the_run_of_points_step_by_step(tmp_path, method):
    settings = {"logging_steps": 1}
    points = trained(tmp_path / "point", method, **settings)
    still = {"member_kind": "gaussian", "initial_std": 0.0, "std_learning_rate": 0.0}
    gaussian = trained(tmp_path / "gaussian", method, **settings, **still)
    assert member_distance(gaussian.model, points.model) <= SAME
    for name in ("loss", "nll_mixture", "jensen_gap", "member_load/0", "grad_norm"):
        assert logged(gaussian, name) == pytest.approx(logged(points, name), rel=SAME, abs=SAME)
    small = trained(tmp_path / "small", method, **settings, **{**still, "initial_std": 1e-4})
    assert 0 < member_distance(small.model, points.model) < 0.05
    three = trained(tmp_path / "three", method, **settings, **still, num_draws=3)  # three times the same
    assert member_distance(three.model, points.model) <= SAME
    assert logged(three, "member_load/1") == pytest.approx(logged(points, "member_load/1"), rel=SAME)


def test_one_member_without_spread_is_trl(tmp_path):
    dataset = text_rows(48)
    still = {"member_kind": "gaussian", "initial_std": 0.0, "num_draws": 1}
    ours = trainer_of(tmp_path / "ours", dataset, num_members=1, alpha=0.8, **still, **SETTINGS)
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora())
    assert_equal_curves(ours, theirs, ["loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"])
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME


def test_at_alpha_zero_members_are_runs_of_their_own(tmp_path):
    settings = {**RANDOM, "alpha": 0.0, "num_draws": 2, "max_grad_norm": 0.3}
    together = trained(tmp_path / "both", **settings)
    for member in range(2):
        start = LoraEnsemble.from_base(tiny_model(), 1, lora(), seed=42 + member, member_kind="gaussian")
        start.stack.set_std(0.1)
        alone = trained(tmp_path / str(member), model=start, **{**settings, "num_members": 1})
        assert member_distance(together.model, alone.model, [(member, 0)]) <= SAME


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("settings", "among"),
    [
        ({"token_budget": 150}, SAME),
        ({"gradient_checkpointing": True}, SAME),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, SAME),
        # Pairs run again in the backward, which float64.py does not reach: points differ by 4e-7 here, too.
        ({"routing": "sparse", "routing_threshold": 0.0}, 1e-5),
        slow({"routing": "sparse", "routing_threshold": 0.0, "token_budget": 40}, 1e-5),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_however_a_step_is_cut_up_its_noise_and_its_result_are_the_same(tmp_path, method, settings, among):
    shared = {**RANDOM, "num_draws": 2}
    whole = trained(tmp_path / "whole", method, **shared)
    cut = trained(tmp_path / "cut", method, **shared, **settings)
    assert_same(cut, whole, among)


def test_the_noise_of_other_kinds_and_methods_is_that_of_the_step_too(tmp_path):
    """Micro-batches for Walsh–Hadamard members; parts of a batch for thumbs, which are compared within a batch."""
    shared = {**WALSH_HADAMARD, "num_draws": 2}
    whole = trained(tmp_path / "whole", **shared)
    cut = trained(tmp_path / "cut", **shared, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same(cut, whole)
    shared = {**RANDOM, "num_draws": 2}
    whole = trained(tmp_path / "thumbs", "kto", **shared)
    assert_same(trained(tmp_path / "parts", "kto", **shared, token_budget=60), whole)
    assert logged(whole, "loss")[-1] < logged(whole, "loss")[0]


def test_sampled_and_raced_steps_learn(tmp_path):
    for routing in ("sampled", "raced"):
        settings = {**RANDOM, "num_draws": 2, "max_steps": 16, "learning_rate": 5e-3, "routing": routing}
        loss = logged(trained(tmp_path / routing, **settings), "loss")
        assert sum(loss[-4:]) < 0.9 * sum(loss[:4])


def test_a_race_between_draws_scores_them_with_their_noise():
    ensemble, (ids, mask) = (
        scatter_members(LoraEnsemble.from_base(tiny_model(), 2, lora(), member_kind="gaussian"), std=0.5),
        padded_batch(),
    )
    ensemble.stack.set_std(0.3)
    ids, mask = torch.cat([ids, ids.flip(0)], dim=1), torch.cat([mask, mask.flip(0)], dim=1)  # more than one block
    ids, mask = ids[:1].repeat(3, 1), torch.ones_like(mask)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    ensemble.redraw(3, draws=2)
    with torch.no_grad(), ensemble.of_examples(torch.tensor([7, 2, 5])):
        dense = ensemble(**batch).log_probs
        output, statistics = race(ensemble, RoutingPlan("raced", 0.2), batch, 0.8)
    assert statistics.scored < 1
    alive = (output.log_probs - dense).abs().amax(dim=-1) < 1e-9
    assert 0.25 <= alive.double().mean() < 1
    assert alive.any(dim=0).all()  # the leader of each example is scored to its end


def test_members_drawn_at_alpha_zero_have_the_noise_of_their_examples():
    """A joint forward over the same examples scores the drawn member of each with the same noise."""
    ensemble = scatter_members(LoraEnsemble.from_base(tiny_model(), 2, lora(), member_kind="gaussian"), std=0.5)
    ensemble.stack.set_std(0.3)
    ids, _ = padded_batch()
    batch = {"input_ids": ids[:1].repeat(3, 1), "labels": ids[:1].repeat(3, 1)}
    ensemble.redraw(3, draws=2)
    with ensemble.train().of_examples(torch.tensor([7, 2, 5])):
        with torch.no_grad():
            dense = ensemble(**batch).log_probs
        drawn = Router(ensemble, RoutingPlan("sampled", 0.0)).forward(batch, 0.0).output.log_probs[0]
    is_equal = (dense - drawn).abs().amax(dim=-1) < 1e-5
    assert is_equal.any(dim=0).all()


@pytest.mark.parametrize("random", [RANDOM, WALSH_HADAMARD], ids=lambda settings: settings["member_kind"])
def test_permuting_members_permutes_everything(tmp_path, random):
    order, ends = [2, 0, 1], []
    for name, members in (("plain", [0, 1, 2]), ("permuted", order)):
        start = LoraEnsemble.from_base(tiny_model(), 3, lora(), seed=7, member_kind=random["member_kind"])
        start.stack.set_std(0.1)
        scatter_members(start).stack.keep(members)
        ends.append(trained(tmp_path / name, model=start, **{**random, "num_members": 3, "num_draws": 2}))
    plain, permuted = ends
    assert member_distance(permuted.model, plain.model, list(enumerate(order))) <= SAME
    assert member_distance(permuted.model, plain.model, [(0, 0)]) > 0.1
    assert logged(permuted, "member_load/0") == pytest.approx(logged(plain, "member_load/2"), rel=SAME)


LANGEVIN = {"member_kind": "langevin", "prior_std": 0.5, "adam_epsilon": 1.0, "num_draws": 1}


@pytest.mark.parametrize(
    "random", [RANDOM, slow(WALSH_HADAMARD), slow(LANGEVIN)], ids=lambda settings: settings["member_kind"]
)
def test_two_processes_that_share_the_examples_are_one(tmp_path, random):
    settings = {**PARTING, "num_members": 2, "num_draws": 2, "max_steps": 4, **random}
    kept, logs = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        batch = {"per_device_train_batch_size": 4 // processes}
        assert (
            run(distributed_run, str(folder), processes, free_port(), {**settings, **batch}, processes=processes)
            == [0] * processes
        )
        kept.append(LoraEnsemble.load(folder / "final", base=tiny_model()))
        logs.append([row["loss"] for row in read_log(folder) if "loss" in row])
    assert member_distance(*kept) <= SAME
    for layer, other in zip(*(ensemble.stack.layers.values() for ensemble in kept), strict=True):
        for name in layer.members.spreads:
            one, two = (getattr(members, name) for members in (layer.members, other.members))
            torch.testing.assert_close(one, two, rtol=SAME, atol=SAME)
    assert logs[0] == pytest.approx(logs[1], rel=SAME)


@pytest.mark.slow  # members of points are split over processes in test_member_parallel.py
def test_two_processes_that_share_the_members_are_one(tmp_path):
    settings = {**SETTINGS_OF_A_MESH, **RANDOM, "num_members": 4, "num_draws": 2}
    train(Job(tmp_path / "one", "sft", settings))
    job = Job(tmp_path / "two", "sft", {**settings, **TWO})
    assert run(train_together, 2, free_port(), [job], processes=2) == [0, 0]
    assert_same_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("method", "kind"), [("sft", "gaussian"), slow("dpo", "gaussian"), slow("sft", "walsh_hadamard")]
)
def test_resuming_after_a_kill_changes_nothing(tmp_path, method, kind):
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    settings = {"member_kind": kind, "num_draws": 2, "kl_warmup_ratio": 0.5, "std_learning_rate": 0.05}
    assert run(interrupted_run, str(expected), None, method, settings) == [0]
    assert run(interrupted_run, str(killed), ("between micro-batches", 3), method, settings) == [KILLED]
    assert run(interrupted_run, str(killed), None, method, settings) == [0]
    assert_equal_runs(killed, expected)
    assert (expected / "final" / "member_0" / "distribution.safetensors").exists()
    assert json.loads((expected / "final" / "ensemble.json").read_text())["member_kind"] == kind


# The prior, and the learning rate of the spread


def test_the_prior_holds_the_spread_and_warms_up(tmp_path):
    narrow = {**RANDOM, "prior_std": 1e-3, "max_grad_norm": 0.0, "max_steps": 4}
    at_once = trained(tmp_path / "at_once", **narrow)
    warmed = trained(tmp_path / "warmed", **narrow, kl_warmup_ratio=1.0)
    first = [logged(trainer, "loss")[0] for trainer in (at_once, warmed)]
    free = logged(trained(tmp_path / "free", **{**narrow, "prior_std": None}), "loss")[0]
    assert first[0] > first[1] == pytest.approx(free, rel=SAME)
    divergence = at_once.model.stack.prior(1e-3)().mean()
    assert divergence > 0
    for trainer in (at_once, warmed):
        assert all((layer.members.log_std.exp() < 0.1).all() for layer in trainer.model.stack.layers.values())


def test_the_spread_has_a_learning_rate_of_its_own_and_no_weight_decay(tmp_path):
    trainer = trained(tmp_path, **{**RANDOM, "weight_decay": 0.3, "std_learning_rate": 0.0, "max_steps": 2})
    spreads = {id(layer.members.log_std) for layer in trainer.model.stack.layers.values()}
    *others, own = trainer.optimizer.param_groups
    assert {id(p) for p in own["params"]} == spreads
    assert own["weight_decay"] == 0
    assert not spreads & {id(p) for group in others for p in group["params"]}
    start = torch.full_like(own["params"][0], 0.1).log()
    assert torch.equal(own["params"][0], start)
    moved = trained(tmp_path / "moved", **{**RANDOM, "lr_scheduler_type": "constant"})
    assert [group["lr"] for group in moved.optimizer.param_groups] == [2e-2, 2e-2, 0.05]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_draws": 2}, "num_draws"),
        ({"num_draws": 0}, "num_draws"),
        ({"member_kind": "gausian"}, "member_kind"),
        ({**RANDOM, "initial_std": -1.0}, "initial_std"),
        ({**RANDOM, "initial_std": 0.0}, "initial_std"),
        ({"kl_warmup_ratio": 0.1}, "kl_warmup_ratio"),
        ({**RANDOM, "kl_warmup_ratio": 2.0}, "kl_warmup_ratio"),
        ({**RANDOM, "std_learning_rate": -1.0}, "std_learning_rate"),
        ({**RANDOM, "torch_compile": True}, "torch_compile"),
        ({**RANDOM, "routing_group": "text"}, "member_kind"),
        ({**RANDOM, "num_draws": 4, "routing": "sparse", "routing_threshold": 0.2}, "routing_threshold"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_by_key(tmp_path, settings, key):
    with pytest.raises(ConfigError) as refused:
        trainer_of(tmp_path, **{"num_members": 2, **settings})
    assert refused.value.where == key


def test_auto_and_policies_are_for_points(tmp_path):
    with pytest.raises(ConfigError, match="auto") as refused:
        sft_config(tmp_path, alpha="auto", **RANDOM)
    assert refused.value.where == "alpha"
    start = LoraEnsemble.from_base(tiny_model(), 2, lora(), member_kind="gaussian")
    with pytest.raises(ConfigError, match="one adapter"):
        powerflow_trainer_of(tmp_path, model=start, num_members=2)
    powerflow_trainer_of(tmp_path, model=start.mean(), num_members=2)


def test_an_ensemble_that_is_given_keeps_its_kind(tmp_path):
    start = LoraEnsemble.from_base(tiny_model(), 2, lora(), member_kind="gaussian")
    trainer = trainer_of(tmp_path, model=start, num_members=2, num_draws=2)
    assert trainer.args.member_kind == "gaussian"
    points = LoraEnsemble.from_base(tiny_model(), 2, lora())
    with pytest.raises(ConfigError, match="are point, not gaussian"):
        trainer_of(tmp_path, model=points, num_members=2, member_kind="gaussian")
