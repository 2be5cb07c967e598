"""Rows of a group share one responsibility: exact in a batch, as last seen across batches."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from float64 import SAME, in_float64
from tiny import (
    dpo_trainer_of,
    logged,
    member_distance,
    pair_rows,
    scatter_members,
    text_rows,
    tiny_ensemble,
    trainer_of,
)
from transformers import TrainerCallback

from renyi.errors import ConfigError
from renyi.objectives import renyi_loss, responsibilities
from renyi.routing import GroupEvidence
from renyi.training.checkpoints import find_checkpoints
from renyi.training.group_batches import GroupBatches

AT_ONCE = {"alpha": 0.8, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}
BY_GROUP = {"routing_group": "author", "num_members": 3, **AT_ONCE}
MAKERS = {"sft": (trainer_of, text_rows), "dpo": (dpo_trainer_of, pair_rows)}


def rows_of(method: str, groups: list[object]) -> Dataset:
    return MAKERS[method][1](len(groups)).add_column("author", groups)


def make(method: str, folder, groups: list[object], **settings):
    of_method = {"reference": "base", "beta": 1.0} if method == "dpo" else {}
    return MAKERS[method][0](folder, rows_of(method, groups), **of_method, **settings)


# ---- Batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_batches_keep_groups_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 12, (60,), generator=generator).tolist()
    batches = GroupBatches(groups, 8, seed)
    first, second = list(batches), list(batches)
    size = Counter(groups)
    for epoch in (first, second):
        assert len(epoch) == len(batches)
        assert sorted(row for batch in epoch for row in batch) == list(range(60))
        assert all(len(batch) <= 8 for batch in epoch)
        for group, rows in size.items():
            batches_of = [i for i, batch in enumerate(epoch) if any(groups[row] == group for row in batch)]
            assert len(batches_of) == -(-rows // 8)
    assert first != second
    again = GroupBatches(groups, 8, seed)
    again.set_epoch(1)
    assert list(again) == second


def test_few_batches_are_not_full():
    batches = GroupBatches([i // 3 for i in range(90)], 8, 0)
    assert [len(batch) for batch in batches] == [6] * 15
    assert len(GroupBatches([i // 3 for i in range(90)], 9, 0)) == 10
    assert len(GroupBatches(list(range(10)), 4, 0, drop_last=True)) == 2


# ---- The estimate across batches ---------------------------------------------------------------------------------


def test_parts_of_a_group_add_up_to_the_group(tmp_path):
    """With members that stand still: the losses of the parts sum to the group's, and the last part sees all of it."""
    ell_ME = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    evidence, total = GroupEvidence(["a"] * 7, 3), 0.0
    log_weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for rows in torch.tensor([[4, 0], [1, 6], [3, 2]]):
        others = evidence.of_batch(rows).others
        prior = (log_weights[:, None] + 0.7 * others).log_softmax(0)
        total = total + renyi_loss(ell_ME[:, rows].sum(1, keepdim=True), 0.7, prior)
        seen = responsibilities(ell_ME[:, rows].sum(1, keepdim=True), 0.7, prior)
        evidence.record(rows, ell_ME[:, rows])
    known = ell_ME[:, [4, 0, 1, 6, 3, 2]].sum(1, keepdim=True)
    torch.testing.assert_close(total, renyi_loss(known, 0.7, log_weights))
    torch.testing.assert_close(seen, responsibilities(known, 0.7, log_weights))
    again = GroupEvidence(["a"] * 7, 3)
    evidence.save(tmp_path / "rows")
    again.restore(tmp_path / "rows")
    torch.testing.assert_close(again.of_batch(torch.tensor([5])).others, known)
    with pytest.raises(ValueError, match="holds"):
        GroupEvidence(["a"] * 6, 3).restore(tmp_path / "rows")


# ---- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MAKERS)
def test_one_row_a_group_is_routing_by_row(tmp_path, method):
    with in_float64():
        runs = []
        for name in (None, "author"):
            settings = {"routing_group": name, "num_members": 3, **AT_ONCE, "max_steps": 12, "bf16": False}
            ensemble = tiny_ensemble(3)
            trainer = make(method, tmp_path / str(name), list(range(30)), model=ensemble, **settings)
            trainer.train()
            runs.append(trainer)
        assert member_distance(runs[0].model, runs[1].model) <= SAME
        assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=SAME)


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("budget", [None, 40])
def test_a_group_in_a_batch_is_one_example(tmp_path, method, budget):
    """Loss and gradient are those of the group's summed log-likelihood, also if the batch is run in parts."""
    near = 0.0 if budget is None else 1e-6
    with in_float64():
        groups = ["a", "b", "a", "c", "b", "a"]
        ensemble = tiny_ensemble(3)
        trainer = make(
            method, tmp_path, groups, model=ensemble, per_device_train_batch_size=6, token_budget=budget, **BY_GROUP
        )
        trainer.state.max_steps = 1
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
        loss = trainer.training_step(trainer.model, dict(batch))
        coupled = [p.grad.clone() for p in trainer.trained_parameters()]
        trainer.model.zero_grad()

        group = torch.tensor([["a", "b", "c"].index(trainer.train_dataset[i]["routing_group"]) for i in range(6)])
        ell_ME, units = plain_log_likelihood(trainer, batch, method)
        ell_MG = torch.stack([ell_ME[:, group == g].sum(1) for g in range(3)], dim=1)
        expected = renyi_loss(ell_MG, 0.8).sum() / units
        (3 * expected).backward()
        assert loss.item() == pytest.approx(expected.item(), rel=SAME)
        for ours, summed in zip(coupled, trainer.trained_parameters(), strict=True):
            # The router runs pairs again within the backward pass, where norms compute in float32.
            torch.testing.assert_close(ours, summed.grad, rtol=SAME if budget is None else 1e-4, atol=max(SAME, near))
        assert not torch.allclose(expected, renyi_loss(ell_ME, 0.8).sum() / units)


def plain_log_likelihood(trainer, batch, method: str):
    """ℓ [M, E] from a plain forward with a graph, and the units of the loss."""
    if method == "sft":
        ell = trainer.model.log_likelihood(batch["input_ids"], batch["attention_mask"], batch["labels"])
        return ell, (batch["labels"][:, 1:] != -100).sum()
    from renyi.ensemble import completion_labels

    rows = (batch["input_ids"], batch["attention_mask"], completion_labels(batch))
    both = trainer.model(*rows).log_probs.sum(-1) - trainer.reference.log_probs(batch)
    chosen, rejected = both.chunk(2, dim=1)
    return torch.nn.functional.logsigmoid(trainer.args.beta * (chosen - rejected)), len(chosen[0])


def test_the_order_of_members_and_accumulation_do_not_matter(tmp_path):
    """A group within one micro-batch: two micro-batches of a step are the batch."""
    runs = []
    for name, size, parts in (("whole", 8, 1), ("parts", 4, 2)):
        settings = {**BY_GROUP, "per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        groups = [i // 4 for i in range(8)]  # two groups of four: the same two in every step
        trainer = make("dpo", tmp_path / name, groups, model=tiny_ensemble(3), optim="sgd", max_steps=4, **settings)
        trainer.train()
        runs.append(trainer)
    assert member_distance(runs[0].model, runs[1].model) <= 1e-5


def test_a_group_larger_than_a_batch_comes_to_share_one_member(tmp_path):
    """Twelve rows, four at a time: with members at rest, an epoch later each part sees all of the group."""
    settings = {**BY_GROUP, "max_steps": 6, "learning_rate": 0.0, "per_device_train_batch_size": 4}
    trainer = make("dpo", tmp_path, ["a"] * 12, model=tiny_ensemble(3), **settings)
    trainer.train()
    evidence = trainer.groups.training
    r_M = responsibilities(evidence.ell_MN.sum(dim=1), 0.8)
    loads = [[row[f"member_load/{m}"] for m in range(3)] for row in trainer.state.log_history if "member_load/0" in row]
    for load in loads[-3:]:
        assert load == pytest.approx(r_M.tolist(), abs=1e-5)
    assert loads[0] != pytest.approx(r_M.tolist(), abs=1e-3)


def test_evaluation_is_exact_in_whatever_batches(tmp_path):
    losses = []
    for size in (2, 5):
        trainer = make(
            "dpo",
            tmp_path / str(size),
            ["a"] * 4,
            model=tiny_ensemble(3),
            eval_dataset=rows_of("dpo", ["x", "y", "x", "z", "x", "y", "x"]),
            per_device_eval_batch_size=size,
            **BY_GROUP,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    settings = {**BY_GROUP, "max_steps": 8, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    groups = [i // 5 for i in range(20)]  # larger than a batch, and three epochs
    whole = make("sft", tmp_path / "whole", groups, model=tiny_ensemble(3), **settings)
    whole.train()
    killed = make("sft", tmp_path / "killed", groups, model=tiny_ensemble(3), callbacks=[Stop()], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make("sft", tmp_path / "killed", groups, model=scatter_members(tiny_ensemble(3), seed=5), **settings)
    resumed.train(resume_from_checkpoint=str(find_checkpoints(tmp_path / "killed").newest))
    assert member_distance(whole.model, resumed.model) == 0.0
    assert logged(whole, "loss") == logged(resumed, "loss")


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("sft", "packing", True),
        ("sft", "padding_free", True),
        ("sft", "routing", "raced"),
        ("dpo", "routing_quantity", "length_normalised"),
        ("dpo", "member_kind", "gaussian"),
        ("dpo", "train_sampling_strategy", "group_by_length"),
    ],
)
def test_what_does_not_go_with_groups_is_refused_by_its_key(tmp_path, method, key, value):
    extra = {"prior_std": 1.0} if key == "member_kind" else {}
    with pytest.raises(ConfigError) as caught:
        make(method, tmp_path, ["a"] * 4, routing_group="author", **{key: value}, **extra)
    assert caught.value.where == key
    assert "routing_group" in caught.value.hint


def test_a_column_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no column 'writer'"):
        make("dpo", tmp_path, ["a"] * 4, routing_group="writer")
