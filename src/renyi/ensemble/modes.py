"""Training mode and evaluation mode, which decide whether dropout is active.

A trainer puts its model into training mode. All code that only scores or generates runs inside `evaluating`, and so
gets the same result each time. The joint forward (`joint.py`) and `LoraEnsemble.inference` use it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode. Afterwards each submodule gets back the mode that it had."""
    changed = [m for m in module.modules() if m.training != _repacks(m)]
    for submodule in changed:
        submodule.training = not submodule.training
    try:
        yield
    finally:
        for submodule in changed:
            submodule.training = not submodule.training


def evaluate(module: nn.Module) -> None:
    """Put every submodule into evaluation mode and leave it there, as after loading a model."""
    for submodule in module.modules():
        submodule.training = _repacks(submodule)


def _repacks(module: nn.Module) -> bool:
    """Whether evaluation would change this layer permanently, so that it must always stay in training mode.

    On a CPU, bitsandbytes 0.50 rewrites the weights of a 4-bit layer when it is first evaluated without a gradient.
    No gradient passes through the rewritten layer, so later training would train nothing. The mode of such a layer has
    no other effect.
    """
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)
