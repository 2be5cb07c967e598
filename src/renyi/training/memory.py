"""What activations take in memory, whether gradient checkpointing can be left out, and room for gradients.

TRL turns gradient checkpointing on: the backward runs every block again, which is about a third of a step. On a CPU
with room for the activations of one pass this gains nothing. A pass need not hold the whole batch, because a batch is
run in parts; see `steps.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from renyi.ensemble import LoraEnsemble
from renyi.machine import main_memory

# The share of main memory that activations may take. It goes by the memory of the machine and not by what is free at
# the moment, so that a run that is resumed is split into the same parts.
SHARE = 1 / 8
# A pass also takes memory that it does not keep, and the allocator rounds up: 1.4 times what was kept in a step of four
# members on SmolLM2-135M.
BESIDE = 1.5
# A pass of fewer tokens would not keep a processor busy, and gradient checkpointing costs less.
LEAST_TOKENS = 512
_ROW = 160  # tokens of the rows that are tried; longer rows take no more for each token


def tokens_that_fit(ensemble: LoraEnsemble, longest: int, autocast: Callable[[], AbstractContextManager]) -> int:
    """How many tokens a training pass may have, over all members, so that it stays within `SHARE` of memory.

    Args:
        ensemble: on a CPU.
        longest: the tokens of the longest row.
        autocast: makes the context that training runs its forward in.
    """
    length = max(2, min(longest, _ROW))
    bytes_of_row = _saved_bytes(ensemble, 2, length, autocast) - _saved_bytes(ensemble, 1, length, autocast)
    return int(SHARE * main_memory() * length / max(1.0, BESIDE * bytes_of_row))


def _saved_bytes(ensemble: LoraEnsemble, rows: int, length: int, autocast: Callable[[], AbstractContextManager]) -> int:
    """The bytes that one member's pass over some rows keeps for its backward, frozen weights included."""
    kept: dict[int, torch.UntypedStorage] = {}  # alive until they are summed, so that no two have the same address

    def keep(tensor: Tensor) -> None:  # without a result: a saved tensor that refers to its own graph is never freed
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    was_training = ensemble.training
    ensemble.train()
    try:
        with saved_tensors_hooks(keep, lambda nothing: nothing), ensemble.using([0]), autocast():
            ensemble(torch.ones(rows, length, dtype=torch.long))
    finally:
        ensemble.train(was_training)
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def room_for_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give parameters without a gradient zeros that a backward adds to, so that it need not find room for gradients.

    Else malloc puts them, which stay, between activations, which go. The gaps that remain are too small for the
    activations of the next pass. In a step of eight members on SmolLM2-135M they took 0.3 GB.

    A parameter that the backward does not reach has no gradient afterwards.
    """
    without, reached = [p for p in parameters if p.grad is None], set[Tensor]()
    hooks = [parameter.register_post_accumulate_grad_hook(reached.add) for parameter in without]
    for parameter in without:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for hook, parameter in zip(hooks, without, strict=True):
            hook.remove()
            if parameter not in reached:
                parameter.grad = None
