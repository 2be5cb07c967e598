"""Routing through the trainers: runs in parts, and thresholds of nothing, are the plain run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import (
    dpo_trainer_of,
    logged,
    member_distance,
    powerflow_trainer_of,
    scatter_members,
    text_rows,
    tiny_ensemble,
    tiny_model,
    trainer_of,
)
from torch import Tensor

from renyi import LoraEnsemble, objectives
from renyi.errors import ConfigError

RUNS = {"sft": trainer_of, "dpo": dpo_trainer_of}
# From the first step with members that differ, so that responsibilities are what is tested.
SETTINGS = {"num_members": 3, "alpha": 0.7, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "prior_std": 1.0}
# Adam divides by the root of second moments: rounding shows where a gradient is all but zero. SGD keeps it in scale.
SETTINGS |= {"optim": "sgd", "learning_rate": 0.1}


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


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


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("kind", RUNS)
def test_sparse_that_leaves_nothing_out_is_dense(tmp_path, plain, kind):
    trainer = RUNS[kind](tmp_path, routing="sparse", routing_threshold=1e-30, **SETTINGS)
    trainer.train()
    assert member_distance(trainer.model, plain(kind).model) <= 2e-5
    assert set(logged(trainer, "routing/active")) == {1.0}
    assert set(logged(trainer, "routing/dropped")) == {0.0}


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize(
    ("kind", "routing"),
    [("sft", "sparse"), ("sft", "sampled"), ("sft", "raced"), ("dpo", "sparse"), ("dpo", "sampled")],
)
def test_routed_runs_log_what_they_trained(tmp_path, monkeypatch, kind, routing):
    """Recomputed from responsibilities, and counted: every pair with a graph, and nothing else, is `active`."""
    given = {**SETTINGS, "routing": routing, "routing_threshold": 0.3}
    given |= {"reference": "base"} if kind == "dpo" else {}  # from which the members differ
    trainer = RUNS[kind](tmp_path, model=tiny_ensemble(), **given)
    shares, trained = [], []
    routed, pairing = trainer.objective.of_examples, trainer.model.pairing
    monkeypatch.setattr(
        trainer.objective, "of_examples", lambda *given: (found := routed(*given), shares.append(found[1]))[0]
    )

    def counted(pairs, *examples):
        trained[-1] += len(pairs) / trainer.rows_per_example if torch.is_grad_enabled() else 0
        return pairing(pairs, *examples)

    monkeypatch.setattr(trainer.model, "pairing", counted)
    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda *given: (trained.append(0), step(*given))[1])
    trainer.train()
    active, dropped = logged(trainer, "routing/active"), logged(trainer, "routing/dropped")
    assert len(active) == len(trained) == 6
    assert active == pytest.approx([count / shares[0].numel() for count in trained])
    if routing == "sparse":
        if kind == "sft":  # there the share of the gradient is the responsibility
            assert active == pytest.approx([(r >= 0.3).float().mean().item() for r in shares])
            assert dropped == pytest.approx([(r * (r < 0.3)).sum().item() / r.shape[1] for r in shares])
        assert min(active) < 1
        assert max(dropped) > 0
    else:
        assert active == pytest.approx([1 / 3] * 6)
    if routing == "sampled":
        assert set(dropped) == {0.0}


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 60},
        {"routing": "sparse", "routing_threshold": 0.2},
        {"routing": "sampled"},
        {"routing": "raced", "routing_threshold": 0.2, "token_budget": 100},
        {"routing": "sampled", "alpha_hold_ratio": 1.0},
    ],
)
def test_examples_of_a_packed_row_are_routed_as_rows_of_their_own(tmp_path, settings):
    runs = []
    for padding_free in (False, True):
        given = {**SETTINGS, **settings, "padding_free": padding_free, "max_length": None}
        runs.append(trainer_of(tmp_path / str(padding_free), model=tiny_ensemble(), **given))
        runs[-1].train()
    rows, packed = runs
    assert packed.padding_free
    assert member_distance(packed.model, rows.model) <= 2e-5
    for name in ("loss", "nll_mixture", "num_tokens", "effective_members", "routing/active", "routing/dropped"):
        assert logged(packed, name) == pytest.approx(logged(rows, name), rel=2e-4), name


@pytest.mark.usefixtures("always_sparse")
def test_packed_rows_of_any_length_can_be_routed(tmp_path):
    given = {**SETTINGS, "routing": "sparse", "packing": True, "packing_strategy": "bfd_split", "max_length": 16}
    trainer = trainer_of(tmp_path, text_rows(24, shortest=4, longest=60), **given)
    trainer.train()
    assert all(0 < active <= 1 for active in logged(trainer, "routing/active"))


@pytest.mark.parametrize(("std", "expected"), [(1.0, "sparse"), (0.0, "dense")])
def test_auto_is_sparse_where_few_pairs_matter(tmp_path, monkeypatch, std, expected):
    """A clock on which a scoring pass is as long as a step settles what scoring costs; then the share of pairs decides.

    It follows the batches: a tenth of the way to each batch's share of pairs at or above the threshold.
    """
    monkeypatch.setattr("renyi.training.steps.time.perf_counter", iter(range(10**6)).__next__)
    given = {
        **SETTINGS,
        "alpha": 1.0,
        "max_steps": 12,
        "routing": "auto",
        "routing_threshold": 0.1,
        "learning_rate": 0.0,
    }
    trainer = trainer_of(tmp_path, model=scatter_members(tiny_ensemble(), std=std), **given)
    shares: list[float] = []
    routed = trainer.objective.of_examples

    def watched(*given: Any) -> Any:
        found = routed(*given)
        shares.append((found[1] >= 0.1).float().mean().item())
        return found

    monkeypatch.setattr(trainer.objective, "of_examples", watched)
    trainer.train()
    assert trainer.router.auto.scoring_cost == 1.0
    active = shares[0]
    for share in shares[1:]:
        active += 0.1 * (share - active)
    assert trainer.router.auto.active == pytest.approx(active)
    assert active < 0.8 if expected == "sparse" else active == 1.0
    trainer.router.auto.scoring_cost = 0.1
    assert trainer.router.plan.kind == expected


def test_sparse_trains_as_dense_while_most_pairs_matter(tmp_path, monkeypatch):
    """All pairs matter while alpha is 0. Then few do, and a moving mean over the batches has to see it."""
    given = {**SETTINGS, "num_members": 8, "routing": "sparse", "routing_threshold": 0.12, "max_steps": 50}
    given |= {"alpha": 1.0, "alpha_hold_ratio": 0.16, "learning_rate": 0.0}
    trainer, kinds = trainer_of(tmp_path, model=scatter_members(tiny_ensemble(8), std=3.0), **given), []
    step = trainer.training_step
    monkeypatch.setattr(
        trainer, "training_step", lambda *given: (kinds.append(trainer.router.plan.kind), step(*given))[1]
    )
    trainer.train()
    dense = kinds.count("dense")
    assert kinds == ["sparse"] + ["dense"] * dense + ["sparse"] * (49 - dense)
    assert 8 <= dense < 48
    active = logged(trainer, "routing/active")
    assert set(active[: dense + 1]) == {1.0}
    assert max(active[dense + 1 :]) < 1


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


@pytest.mark.parametrize("routing", ["sampled", "raced"])
def test_nothing_is_scored_to_draw_while_alpha_is_zero(tmp_path, routing):
    """Nor in the first step after an evaluation."""
    given = {**SETTINGS, "alpha_hold_ratio": 1.0, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, routing=routing, eval_dataset=text_rows(4, seed=1), **given)
    trainer.train()
    assert set(logged(trainer, "routing/scored")) == {0.0}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_race_goes_by_the_order_of_its_step(tmp_path, monkeypatch):
    """At 0 while alpha is held, between in the ramp, and the schedule's in the first step after an evaluation.

    The total variation between the responsibilities that the race went by and those of the schedule.
    """
    rows = text_rows(16, shortest=40, longest=60)
    given = {**SETTINGS, "max_steps": 9, "alpha_hold_ratio": 1 / 3, "alpha_ramp_ratio": 1 / 3, "token_budget": 1}
    given |= {"eval_strategy": "steps", "eval_steps": 2, "routing": "raced", "routing_threshold": 1e-6}
    trainer = trainer_of(tmp_path, rows, model=tiny_ensemble(), eval_dataset=rows.select(range(4)), **given)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def watched(ell_MB: Tensor, *order: Any) -> Tensor:
        used = objectives.example_responsibilities(ell_MB, *order)
        found.setdefault(trainer.state.global_step, []).append((ell_MB, used))
        return used

    monkeypatch.setattr("renyi.routing.race.example_responsibilities", watched)
    trainer.train()
    assert sorted(found) == list(range(9))

    def variation(step: int, alpha: float) -> float:
        return max(0.5 * ((alpha * ell).softmax(0) - used).abs().sum(0).max().item() for ell, used in found[step])

    for step in range(9):
        scheduled = 0.7 * min(max((step / 9 - 1 / 3) * 3, 0), 1)
        assert variation(step, scheduled) <= 1e-5
        if step < 6:
            assert variation(step, 0.7) > 0.01  # so that the final order would be seen


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("budget", [None, 60, 1])
def test_a_shared_hold_is_the_run_of_one_adapter(tmp_path, kind, budget):
    """For all of its members, which part as soon as alpha rises."""
    one = RUNS[kind](tmp_path / "one", **{**SETTINGS, "num_members": 1, "alpha": 0.0})
    given = {**SETTINGS, "routing": "sampled", "alpha_hold_shared": True, "token_budget": budget}
    shared = RUNS[kind](tmp_path / "shared", **{**given, "alpha_hold_ratio": 1.0})
    parting = RUNS[kind](tmp_path / "parting", **{**given, "alpha_hold_ratio": 0.5})
    for trainer in (one, shared, parting):
        trainer.train()
    expected = dict(one.model.named_parameters())
    for name, parameter in shared.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name].expand_as(parameter), rtol=0, atol=2e-5)
    assert logged(shared, "loss") == pytest.approx(logged(one, "loss"), rel=2e-4)
    assert logged(shared, "routing/scored") == [0.0] * 6
    assert logged(parting, "routing/scored") == [0.0] * 3 + [1.0] * 3
    assert all((p[0] != p[1]).any() for p in parting.trained_parameters())


def test_only_equal_members_can_be_trained_as_one(tmp_path):
    with pytest.raises(ConfigError, match="the members of the given ensemble differ"):
        trainer_of(
            tmp_path,
            model=tiny_ensemble(),
            routing="sampled",
            alpha_hold_shared=True,
            **{**SETTINGS, "alpha_hold_ratio": 0.5},
        )


@pytest.mark.parametrize("routing", ["sampled", "raced"])
def test_kept_scores_are_those_of_members_that_stand_still(tmp_path, routing):
    given = {**SETTINGS, "learning_rate": 0.0, "num_train_epochs": 4, "max_steps": -1}
    dense = trainer_of(tmp_path / "dense", model=tiny_ensemble(), **given)
    kept = trainer_of(
        tmp_path / "kept", model=tiny_ensemble(), routing=routing, routing_threshold=0.0, routing_refresh=3, **given
    )
    for trainer in (dense, kept):
        trainer.train()
    steps = len(logged(dense, "loss")) // 4
    assert logged(kept, "routing/scored") == [1.0] * steps + [0.0] * 2 * steps + [1.0] * steps
    assert logged(kept, "routing/active") == pytest.approx([1 / 3] * 4 * steps)
    for name in ("loss", "nll_mixture", "nll_members", "effective_members", "member_load/1"):
        assert logged(kept, name) == pytest.approx(logged(dense, name), rel=1e-5)


def test_only_rows_that_are_due_are_scored_again(tmp_path):
    """Alpha rises within the first epoch of three: the rows before that are scored in the second, the others not."""
    given = {**SETTINGS, "alpha_hold_ratio": 1 / 8, "num_train_epochs": 3, "max_steps": -1}
    trainer = trainer_of(tmp_path, routing="sampled", routing_refresh=2, **given)
    trainer.train()
    scored = logged(trainer, "routing/scored")
    assert scored[:8] == [0.0] * 3 + [1.0] * 5
    assert sum(scored[8:16]) == pytest.approx(3)
    assert sum(scored[16:]) == pytest.approx(5)
    # A dense run with the same shares would have the same mixture at every step, were it not for what members learn.
    still = [
        trainer_of(tmp_path / routing, model=tiny_ensemble(), **{**given, **more, "learning_rate": 0.0})
        for routing, more in (
            ("dense", {}),
            ("sampled", {"routing": "sampled", "routing_refresh": 2, "token_budget": 60}),
        )
    ]
    for run in still:
        run.train()
    dense, kept = (logged(run, "nll_mixture")[3:] for run in still)
    assert kept == pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize("budget", [30, 200])
def test_a_batch_over_the_budget_is_drawn_in_parts(tmp_path, budget):
    """Whether alpha is zero or scores are kept, no member is scored that is not trained."""
    given = {**SETTINGS, "alpha_hold_ratio": 0.25, "num_train_epochs": 4, "max_steps": -1, "routing_refresh": 3}
    trainer = trainer_of(tmp_path, routing="sampled", token_budget=budget, **given)
    trainer.train()
    steps = len(logged(trainer, "loss")) // 4
    assert logged(trainer, "routing/scored") == [0.0] * steps + [1.0] * steps + [0.0] * 2 * steps


@pytest.mark.parametrize("routing", ["sampled", "raced", "auto", "kept"])
def test_an_interrupted_run_goes_on_as_it_would_have(tmp_path, routing, monkeypatch):
    # What a pass takes is another time each time; here it is what it is.
    monkeypatch.setattr("renyi.training.steps.time.perf_counter", iter(range(10**6)).__next__)
    given = {**SETTINGS, "routing": routing, "routing_threshold": 0.3, "save_strategy": "steps", "save_steps": 3}
    if routing == "kept":  # interrupted among visits that follow the kept scores
        given |= {"routing": "sampled", "routing_refresh": 3, "num_train_epochs": 3, "max_steps": -1, "save_steps": 15}
    whole = trainer_of(tmp_path / "whole", **given)
    whole.train()
    (tmp_path / "cut").mkdir()
    checkpoint = f"checkpoint-{given['save_steps']}"
    (tmp_path / "whole" / checkpoint).rename(tmp_path / "cut" / checkpoint)
    resumed = trainer_of(tmp_path / "cut", **given)
    resumed.train(resume_from_checkpoint=True)
    assert member_distance(resumed.model, whole.model) == 0
    assert logged(resumed, "routing/scored")[-1] == logged(whole, "routing/scored")[-1]
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


@pytest.mark.parametrize(
    ("settings", "examples"), [({}, 4), ({"token_budget": 50}, 1), ({"padding_free": True, "max_length": None}, 4)]
)
def test_a_rehearsal_runs_the_largest_part_of_a_step(tmp_path, monkeypatch, settings, examples):
    trainer = trainer_of(tmp_path, **SETTINGS, **settings)
    longest = trainer._lengths.sort(descending=True).values[:examples].sum()
    seen, step = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen.append(int((inputs["input_ids"] != 0).sum()))
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.rehearse()
    assert seen == [longest]


@pytest.mark.parametrize("cut", [3, None])
def test_a_rehearsal_needs_a_mask_as_steps_do(tmp_path, monkeypatch, cut):
    """The longest rows have one length here. A step with rows of several lengths needs a mask, which takes memory."""
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10]} for _ in range(8)] + [{"input_ids": [5, 6, 7, 8, 9, 10][:cut]}]
    trainer = trainer_of(tmp_path, Dataset.from_list(rows), **SETTINGS)
    masks, step = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        masks.append(bool(inputs["attention_mask"].all()))
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.rehearse()
    assert masks == [cut is None]


def test_a_rehearsal_scores_members_before_one_is_drawn(tmp_path, monkeypatch):
    """While alpha is 0 they are not scored, but at most steps alpha is above 0."""
    trainer = trainer_of(tmp_path, **SETTINGS | {"alpha_hold_ratio": 0.5}, routing="sampled")
    passes, scored = [], trainer.router._scored
    monkeypatch.setattr(trainer.router, "_scored", lambda *given: passes.append(given) or scored(*given))
    trainer.rehearse()
    assert len(passes) == 1
    assert trainer.scheduled_alpha == 0


# What does not go together


@pytest.mark.parametrize(
    ("make", "settings", "where"),
    [
        (trainer_of, {"routing": "spars"}, "routing"),
        (trainer_of, {"routing": "sparse", "routing_threshold": 0.6}, "routing_threshold"),
        (trainer_of, {"token_budget": 0}, "token_budget"),
        (trainer_of, {"alpha_hold_shared": True}, "routing"),
        (trainer_of, {"alpha_hold_shared": True, "routing": "sampled", "alpha": 0.0}, "alpha"),
        (trainer_of, {"alpha_hold_shared": True, "routing": "raced", "alpha_hold_ratio": 0.0}, "alpha_hold_ratio"),
        (trainer_of, {"alpha_hold_shared": True, "routing": "raced", "member_kind": "gaussian"}, "member_kind"),
        (powerflow_trainer_of, {"alpha_hold_shared": True}, "routing"),
        (trainer_of, {"routing_refresh": 0}, "routing_refresh"),
        (trainer_of, {"routing_refresh": 2}, "routing"),
        (trainer_of, {"routing": "sampled", "routing_refresh": 2, "padding_free": True}, "padding_free"),
        (trainer_of, {"routing": "sampled", "routing_refresh": 2, "packing": True}, "packing"),
        (trainer_of, {"routing": "sampled", "routing_refresh": 2, "routing_group": "author"}, "routing_group"),
        (trainer_of, {"routing": "sampled", **REENTRANT}, "gradient_checkpointing_kwargs"),
        (dpo_trainer_of, {"token_budget": 100, **REENTRANT}, "gradient_checkpointing_kwargs"),
        (dpo_trainer_of, {"routing": "raced"}, "routing"),
        (powerflow_trainer_of, {"routing": "sparse"}, "routing"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, make, settings, where):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, num_members=2, **settings)
    assert error.value.where == where
