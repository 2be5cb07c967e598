"""A callback that learns the mixture weights from responsibilities. Read next: `objective.py`, which feeds it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.ensemble import LoraEnsemble


class LearnMixtureWeights(TrainerCallback):
    """Online expectation–maximisation of the mixture weights.

    At a stationary point of the objective a member's weight equals its load, the mean of its responsibilities
    (the M-step of a mixture). After every optimizer step the weights move a little towards the loads of that step's
    examples; while alpha is 0 responsibilities equal the weights and nothing moves.
    """

    def __init__(self, ensemble: LoraEnsemble, reduce: Callable[[Any], Any], rate: float):
        """`reduce` sums a tensor over processes."""
        self.ensemble, self.reduce, self.rate = ensemble, reduce, rate
        self._loads_M: Tensor | float = 0.0

    def add(self, r_ME: Tensor) -> None:
        """Add the responsibilities [M, E] of one micro-batch."""
        self._loads_M = self._loads_M + r_ME.sum(dim=1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        loads_M = self.reduce(self._loads_M)
        self._loads_M = 0.0
        weights = self.ensemble.weights
        weights.lerp_(loads_M / loads_M.sum(), self.rate)
        weights /= weights.sum()
