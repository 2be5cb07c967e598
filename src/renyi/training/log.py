"""What an ensemble trainer logs: means since the last log, trained tokens, and a warning about members that starve.

What is summed for every ensemble is in `renyi.routing.statistics`; what a run leaves on disk (`metrics.jsonl`,
`training.png`) in `report.py`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.routing import Sums
from renyi.training.schedule import follow_schedule

logger = logging.getLogger(__name__)

# A member whose load stays below a tenth of its fair share over this many logs is called starved.
STARVED_LOGS = 3


class StarvedMembers:
    """Warns once a run about a member whose load stays far below its share after alpha has reached its value."""

    def __init__(self, num_members: int):
        self.low_logs = [0] * num_members  # logs in a row with a low load, by member
        self.has_warned = False

    def see(self, loads: Sequence[float], is_settled: bool) -> None:
        """Count the low loads of one log; `is_settled` says whether alpha has reached its value."""
        num_members = len(loads)
        for m, load in enumerate(loads):
            self.low_logs[m] = self.low_logs[m] + 1 if is_settled and load < 1 / (10 * num_members) else 0
            if self.low_logs[m] == STARVED_LOGS and not self.has_warned:
                self.has_warned = True
                logger.warning(
                    "Member %d starves: it explains %.1f%% of the examples (a fair share is %.1f%%), so it learns next "
                    "to nothing and its answers pollute every uncertainty. Hold alpha at 0 for longer "
                    "(alpha_hold_ratio), train fewer members (num_members), or drop it afterwards with "
                    "LoraEnsemble.drop_member(%d).",
                    m, 100 * load, 100 / num_members, m,
                )  # fmt: skip


class TrainingLog:
    """Sums of what was watched since the last log, separate for training ("train") and evaluation ("eval").

    Args:
        device: where sums are kept.
        num_members: M.
        reduce: sums a tensor over processes.
    """

    def __init__(self, device: torch.device, num_members: int, reduce: Callable[[Tensor], Any]):
        self.device, self.reduce = device, reduce
        self.watched = {mode: RunningMeans(device) for mode in ("train", "eval")}
        self.starved = StarvedMembers(num_members)
        self._tokens: Tensor | int = 0

    def add(self, batch: Sums, mode: str) -> None:
        self.watched[mode].add(batch)

    def add_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        """Count the tokens of a training batch, without padding."""
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._tokens = self._tokens + seen

    def take_tokens(self) -> int:
        """Tokens of all processes since the last call. Call it once a step: processes may split a step differently."""
        tokens, self._tokens = torch.as_tensor(self._tokens, device=self.device), 0
        return int(self.reduce(tokens))

    def take(self, mode: str) -> dict[str, float]:
        """The means over all processes since the last log; summing starts anew."""
        watched, self.watched[mode] = self.watched[mode], RunningMeans(self.device)
        return watched.means(self.reduce(watched.sums)) if watched.names else {}

    def state(self) -> dict[str, Any]:
        """What was added up since the last log of training, for a checkpoint; the same in every process."""
        watched = self.watched["train"]
        return {
            "watched": watched.state(self.reduce(watched.sums)),
            "starved_logs": self.starved.low_logs,
            "warned_starved": self.starved.has_warned,
        }

    def restore(self, state: Mapping[str, Any], holds_sums: bool) -> None:
        """Go on from a checkpoint's state. One process takes the sums of all (`holds_sums`)."""
        watched = self.watched["train"]
        watched.restore(state["watched"])
        if not holds_sums:
            watched.sums = torch.zeros_like(watched.sums)
        self.starved.low_logs, self.starved.has_warned = state["starved_logs"], state["warned_starved"]


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


class AfterLoopBegan(TrainerCallback):
    """Puts a checkpoint's sums and learning rates back once the training loop has begun, because the loop resets them.

    Args:
        restore: puts the sums back.
    """

    def __init__(self, restore: Callable[[], None]):
        self.restore = restore

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()
        follow_schedule(kwargs.get("lr_scheduler"))
