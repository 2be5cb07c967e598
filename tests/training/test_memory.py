"""Gradient checkpointing is left out where activations fit in memory, and only there."""

import gc
from typing import Any

import pytest
import torch
from tiny import tiny_ensemble, trainer_of
from torch import nn

from renyi.training import memory

OPEN = {"gradient_checkpointing": None}


def test_activations_of_a_row_are_counted_to_the_byte() -> None:
    """Twice the features need twice the bytes where all that is kept has that size."""
    ensemble = tiny_ensemble(2)
    two, four = (
        memory._saved_bytes(ensemble, rows + 1, 10, torch.enable_grad)
        - memory._saved_bytes(ensemble, rows, 10, torch.enable_grad)
        for rows in (2, 4)
    )
    assert two == four > 10 * 32 * 4  # a row is a row, and the hidden states of one layer alone take that
    fits = memory.tokens_that_fit(ensemble, 10, torch.enable_grad)
    assert fits == int(memory.SHARE * memory.main_memory() * 10 / (memory.BESIDE * two))
    assert not ensemble.training


def test_nothing_of_the_measured_pass_stays_in_memory() -> None:
    ensemble = tiny_ensemble(2)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(held, torch.Tensor) for held in gc.get_objects())

    memory.tokens_that_fit(ensemble, 10, torch.enable_grad)
    before = tensors()
    memory.tokens_that_fit(ensemble, 10, torch.enable_grad)
    assert tensors() == before


def test_checkpoints_are_left_out_where_there_is_room(monkeypatch, tmp_path) -> None:
    trainer = trainer_of(tmp_path, **OPEN)
    assert not trainer.args.activation_checkpointing
    trained = [trainer]
    for room in (10**9, 10**5):
        monkeypatch.setattr(memory, "main_memory", lambda room=room: room)
        trained.append(trainer_of(tmp_path, **OPEN))
    roomy, cramped = trained[1:]
    assert not roomy.args.activation_checkpointing
    assert roomy.router.plan.token_budget == trainer.router.plan.token_budget == 4096
    assert cramped.args.activation_checkpointing
    assert cramped.args.gradient_checkpointing
    for each in (roomy, cramped):
        each.train()
    assert cramped.model.base.is_gradient_checkpointing
    assert not roomy.model.base.is_gradient_checkpointing
    for one, other in zip(roomy.trained_parameters(), cramped.trained_parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_passes_shrink_to_what_fits(monkeypatch, tmp_path) -> None:
    whole = memory.tokens_that_fit(tiny_ensemble(4), 12, torch.enable_grad)
    bytes_of_token = memory.SHARE * memory.main_memory() / whole
    monkeypatch.setattr(memory, "main_memory", lambda: int(3000 * bytes_of_token / memory.SHARE))
    trainer = trainer_of(tmp_path, **OPEN)
    assert not trainer.args.activation_checkpointing
    assert 2900 < trainer.router.plan.token_budget < 3100
    assert trainer_of(tmp_path, token_budget=4000, **OPEN).args.activation_checkpointing
    assert not trainer_of(tmp_path, token_budget=2000, **OPEN).args.activation_checkpointing


@pytest.mark.parametrize("given", ["gradient_checkpointing", "activation_checkpointing"])
def test_what_is_given_stays(tmp_path, given: str) -> None:
    for value in (True, False):
        args = trainer_of(tmp_path, **{**OPEN, given: value}).args
        assert args.activation_checkpointing == args.gradient_checkpointing == value


def test_a_rehearsal_checkpoints_as_training_does(tmp_path) -> None:
    trainer = trainer_of(tmp_path, gradient_checkpointing=True)
    trainer.rehearse()
    assert trainer.model.base.is_gradient_checkpointing


def test_a_backward_adds_to_zeros_and_gives_nothing_to_what_it_does_not_reach() -> None:
    """Gradients are PyTorch's: new ones, older ones with the new added, and none where the loss does not depend."""
    reached, older, unreached = (nn.Parameter(torch.tensor([2.0, 3.0])) for _ in range(3))
    older.grad = kept = torch.tensor([10.0, 20.0])
    with memory.room_for_gradients([reached, older, unreached]):
        room = reached.grad
        (reached * older).sum().backward()
    assert [reached.grad, older.grad, unreached.grad] == [room, kept, None]
    assert (room.tolist(), kept.tolist()) == ([2, 3], [12, 23])


def test_a_step_on_a_cpu_makes_room_for_gradients_once_and_before_it(tmp_path, monkeypatch) -> None:
    trainer = trainer_of(tmp_path, token_budget=40, gradient_accumulation_steps=2, max_steps=2)
    rooms, loss = [], trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        rooms.append({p.grad.data_ptr() for p in trainer.trained_parameters()})
        return loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    per_step = len(rooms) // 2
    assert per_step > 2  # parts, so that a gradient made late would have been seen as None
    for step in (rooms[:per_step], rooms[per_step:]):
        assert all(room == step[0] for room in step)
