"""Whether members part on held-out rows as they do on rows they were trained on. If not, they split what they memorise.

A member explains best what it has seen. When rows are seen several times, whichever member learned more from a row at
first takes it again, so members may part by "who has seen this row" where nothing else tells their data apart. Such
responsibilities say nothing about other rows. A row's first visit comes before anything is learned from it, so the
comparison begins with the second pass.

What is compared is in every run's log. Read next: `log.py`, what else is watched.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# Memory leads if the Jensen gap on held-out rows is below this share of that on rows seen. It lies between worlds with
# nothing to part over but rows and worlds with sources (the tests have both), and below a real run (docs/evidence.md).
MEMORY_LEADS = 1 / 3
# Below this share of all members, an example has members of its own. Members that share everything have no side.
HAVE_PARTED = 0.9
_LOGS = 3  # of the training, before an evaluation, that are compared with it


class Parting(NamedTuple):
    """How far M members part on rows seen before and on rows held out; means over the last logs.

    Attributes:
        num_members: M.
        seen, held_out: Jensen gap, nats a unit.
        effective_seen, effective_held_out: effective members of an example, 1 to M.
    """

    num_members: int
    seen: float
    held_out: float
    effective_seen: float
    effective_held_out: float

    @property
    def is_memory(self) -> bool:
        """Whether members have parted on rows that were seen, and by less than a third as much on others."""
        return self.effective_seen < HAVE_PARTED * self.num_members and self.held_out < MEMORY_LEADS * self.seen

    def told(self, unit: str) -> str:
        """A sentence for the user, with the gaps per `unit`."""
        return (
            f"members part on rows that they were trained on (Jensen gap {self.seen:.3f} nats per {unit}, "
            f"{self.effective_seen:.1f} of {self.num_members} members an example) but far less on held-out rows "
            f"({self.held_out:.3f}, {self.effective_held_out:.1f}): they split what they memorise, not sources. "
            "One pass over more rows, or routing_group where rows have a common source, works against it."
        )


def parting(log_history: Sequence[Mapping[str, Any]], num_members: int, alpha: float) -> Parting | None:
    """Compare the newest evaluation with the logs of training before it.

    Only logs count at which alpha had its value and every row had been seen before.

    Args:
        log_history: of the trainer's state.
        num_members: M.
        alpha: the order that training arrives at.

    Returns:
        None if there is no evaluation, or no such log before it.
    """
    at = next((i for i in reversed(range(len(log_history))) if _gap_of_evaluation(log_history[i])), None)
    if at is None or alpha == 0 or num_members == 1:
        return None
    train = [row for row in log_history[:at] if "jensen_gap" in row]
    # A log is about the steps since the one before it.
    pairs = itertools.pairwise(train)
    seen = [row for before, row in pairs if before["alpha"] >= alpha and before["epoch"] >= 1][-_LOGS:]
    if not seen:
        return None
    gap = _gap_of_evaluation(log_history[at])
    assert gap is not None
    return Parting(
        num_members,
        sum(row["jensen_gap"] for row in seen) / len(seen),
        log_history[at][gap],
        sum(row["effective_members"] for row in seen) / len(seen),
        log_history[at][gap.removesuffix("jensen_gap") + "effective_members"],
    )


def _gap_of_evaluation(row: Mapping[str, Any]) -> str | None:
    """The name of the Jensen gap in the log of an evaluation; of several datasets, each has a log of its own."""
    return next((name for name in row if name.startswith("eval_") and name.endswith("jensen_gap")), None)


class WarnOfMemory(TrainerCallback):
    """Warns once a run, after an evaluation, if members split what they memorise."""

    def __init__(self, num_members: int, alpha: float, unit: str):
        self.num_members, self.alpha, self.unit = num_members, alpha, unit
        self.has_warned = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        found = parting(state.log_history, self.num_members, self.alpha)
        if found and found.is_memory and not self.has_warned:
            self.has_warned = True
            logger.warning("After step %d %s", state.global_step, found.told(self.unit))
