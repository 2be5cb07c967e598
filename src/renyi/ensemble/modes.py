"""Training and evaluation mode: who drops, and when.

A trainer puts its model into training mode by itself. Everything that only asks the members something does so inside
`evaluating`, and gets the same answer each time. Used by the joint forward (`joint.py`) and by every function of
`renyi.inference`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode; afterwards each one has the mode back that it had itself."""
    changed = [m for m in module.modules() if m.training != _repacks(m)]
    for submodule in changed:
        submodule.training = not submodule.training
    try:
        yield
    finally:
        for submodule in changed:
            submodule.training = not submodule.training


def evaluate(module: nn.Module) -> None:
    """Put every submodule into evaluation mode for good, as a model is after loading."""
    for submodule in module.modules():
        submodule.training = _repacks(submodule)


def _repacks(module: nn.Module) -> bool:
    """Whether evaluation changes this layer for good, so that it is always left in training mode.

    On a CPU, bitsandbytes 0.50 rewrites the weights of a 4-bit layer when it is first evaluated without a gradient.
    The rewritten layer passes no gradient on, so that training afterwards would train nothing. The mode of such a layer
    decides nothing else.
    """
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)
