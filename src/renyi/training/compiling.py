"""Compiled blocks: whether a run is long enough for them, and what happens if they cannot be compiled.

Between matrix products, a training step in half precision makes many passes over activations. A compiler joins them.
On a CPU, steps of SmolLM2-135M then take about two thirds of the time (`python benchmarks/real_step.py`), and compiling
takes up to a minute, once a run.

Read next: `renyi.ensemble.facade`, which compiles.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from renyi.ensemble import LoraEnsemble

# Operations a second of plain training on one core, as seen on SmolLM2-135M. Only the order of magnitude matters.
RATE = 2e11
# A run that would take so long without compiled blocks gains more than compiling takes.
LEAST_SECONDS = 180


def compiling_pays(ensemble: LoraEnsemble, args: Any, tokens: Callable[[], float]) -> bool:
    """Whether blocks are compiled in a run that does not say so itself.

    The answer goes by the settings and the number of cores, not by a measured time. So a run that is resumed computes
    the same numbers. Where compiled blocks were not measured (GPUs, float32, several processes, gradient
    checkpointing), the answer is no. It is no, too, where a step runs some pairs of members and examples (routing,
    routing_group): each choice of members would be compiled anew.

    Args:
        ensemble: its members.
        args: the trainer's config.
        tokens: counts the tokens of all steps together, under one member.
    """
    measured = (
        args.device.type == "cpu"
        and (args.bf16 or args.fp16)
        and args.routing == "dense"
        and args.routing_group is None
        and args.world_size == 1
        and not args.gradient_checkpointing
        and not ensemble.stack.is_random
    )
    if not measured:
        return False
    operations = 4 * ensemble.base.num_parameters() * tokens() * len(ensemble.members)
    return operations / (RATE * torch.get_num_threads()) >= LEAST_SECONDS


@contextmanager
def compiled(ensemble: LoraEnsemble, args: Any, autocast: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Compile the ensemble's blocks for the training inside, as `args.compile_blocks` says.

    If blocks were not asked for and cannot be compiled, which a small batch shows before training begins, they stay as
    they are, with a warning. Lengths are variables of the graph, so that it serves all batches.

    Args:
        ensemble: its members.
        args: the trainer's config.
        autocast: makes the context that training runs its forward in.
    """
    if args.compile_blocks is None:
        yield
        return
    with ensemble.compiling(dynamic=True, **args.compile_blocks):
        fault = _fault(ensemble, autocast) if args.compiles_if_it_pays else None
        if fault is None:
            yield
            return
    warnings.warn(
        "blocks could not be compiled here, so this run is slower. Write torch_compile: false to leave it out, or true "
        f"to see the whole error, which begins: {fault}",
        stacklevel=2,
    )
    yield


def _fault(ensemble: LoraEnsemble, autocast: Callable[[], AbstractContextManager]) -> str | None:
    """What goes wrong in a step on a small padded batch; None if nothing does. No weight changes."""
    # Not 8 or 16 tokens: a length that is also a size of the model would be taken for a constant.
    ids = torch.ones(3, 11, dtype=torch.long, device=ensemble.device)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    training = ensemble.training
    try:
        with torch.random.fork_rng(devices=[]), autocast():
            ensemble.train()(ids, mask).log_probs.sum().backward()
    except Exception as error:  # compilers and their backends raise errors of many kinds
        return " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
    finally:
        ensemble.zero_grad(set_to_none=True)
        ensemble.train(training)
    return None
