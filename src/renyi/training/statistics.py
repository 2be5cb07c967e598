"""Sums that are kept between two logs, and a callback that learns mixture weights from responsibilities.

Read next: `renyi.routing.statistics`, which says what is summed for an ensemble.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.ensemble import LoraEnsemble
from renyi.routing import Sums


class RunningMeans:
    """Means over what this process saw since the last log, each kept as a sum and a count.

    Sums can be added, so the means over processes, micro-batches and log intervals are exact.
    """

    def __init__(self, device: torch.device):
        self.names: list[str] = []
        self.sums = torch.zeros(2, 0, dtype=torch.float64, device=device)  # sums, counts

    def add(self, batch: Sums) -> None:
        """Add the sums of a batch. Every batch has the same names."""
        added = torch.stack([torch.stack([x.double() for x in pair]) for pair in batch.values()], dim=1)
        if not self.names:
            self.names, self.sums = list(batch), torch.zeros_like(added)
        self.sums = self.sums + added

    def means(self, sums: Tensor) -> dict[str, float]:
        """The means by name, from the `sums` of all processes. A mean over nothing is left out."""
        totals, counts = sums.tolist()
        return {name: x / n for name, x, n in zip(self.names, totals, counts, strict=True) if n > 0}

    def state(self, sums: Tensor) -> dict[str, list[float]]:
        return dict(zip(self.names, sums.T.tolist(), strict=True))

    def restore(self, state: Mapping[str, list[float]]) -> None:
        self.names = list(state)
        values = torch.tensor(list(state.values()), dtype=torch.float64, device=self.sums.device)
        self.sums = values.T.contiguous() if state else self.sums.new_zeros(2, 0)


def mean_of_members(values_MBT: Tensor) -> Tensor:
    """The sum over the tokens of a batch, averaged over the members that this process holds."""
    return values_MBT.sum() / len(values_MBT)


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
