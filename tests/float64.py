"""Everything in double precision, so that two ways to one result differ by less than any fault would make them.

Two orders of summation differ by a few units in the last place. Training makes more of it: Adam divides by the root of
a gradient that may have cancelled, and each step starts from the last. In float32 (1.2e-7) what remains reaches 1e-5 or
more and differs from CPU to CPU. In float64 (2.2e-16) the runs of these tests were found to agree to 1e-12 or better.
Equalities are therefore asserted in float64, to 1e-9, which no fault of ours would stay below.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import transformers.modeling_utils
import trl.trainer.dpo_trainer
from torch.overrides import TorchFunctionMode
from trl.kernels import ChunkedLogProbFunction

# What equal runs may differ by, relative: 4e6 units in the last place of a float64.
SAME = 1e-9


class _NoFloat32(TorchFunctionMode):
    """What asks for float32 gets float64: norms of transformers and the head of TRL do, whatever the model's dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _TorchWithoutFloat32:
    """`torch` for a module that looks dtypes up in a table."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


def _in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _NoFloat32():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def in_float64() -> Iterator[None]:
    """Models made and trained inside are float64 throughout."""
    before, checkpoint = torch.get_default_dtype(), transformers.modeling_utils.checkpoint
    # A mode does not reach into the backward pass: neither what TRL computes there nor what checkpointing does again.
    backward = staticmethod(_in_float64(ChunkedLogProbFunction.backward))

    def checkpointed(function: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(_in_float64(function), *args, **kwargs)

    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float64)
        stack.enter_context(_NoFloat32())
        stack.enter_context(patch.object(ChunkedLogProbFunction, "backward", backward))
        stack.enter_context(patch.object(transformers.modeling_utils, "checkpoint", checkpointed))
        stack.enter_context(patch.object(trl.trainer.dpo_trainer, "torch", _TorchWithoutFloat32()))
        yield
