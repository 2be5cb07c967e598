"""The settings of routing, and the cutting of a batch into parts. Read next: `router.py`, which runs a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUTINGS = ("dense", "sampled", "sparse", "raced", "auto")
SHARE = "share_of_batch"  # a key in a part of a batch: the part's number of examples divided by the whole batch's
PLACES = "places_in_batch"  # a key in a part of a batch: the places of its examples in the whole batch

Batch = dict[str, Any]  # the arguments of a joint forward


@dataclass(frozen=True)
class RoutingPlan:
    """Which pairs of M members and E examples a training step runs.

    Attributes:
        kind: one of `ROUTINGS`.
            "dense": every pair.
            "sampled": one member per example. It is drawn by its share of the gradient and weighted with the inverse of
            that share, so the gradient is unbiased.
            "sparse": the pairs whose share is at least `threshold`.
            "raced": as "sampled", but members that fall behind are not scored further.
            "auto": "dense" or "sparse", whichever `AutoRouting` chooses.
        threshold: ε, the share below which a pair is left out.
        token_budget: the greatest number of tokens, with padding, in a pass that keeps a graph; None for no limit.
            Passes that only score keep no graph. In these an example runs under all members at once, even if that
            exceeds the budget.
        rows_per_example: 2 for batches of preference pairs, in which all chosen rows come before all rejected rows.
    """

    kind: str = "dense"
    threshold: float = 0.01
    token_budget: int | None = None
    rows_per_example: int = 1

    def takes(self, rows: int, length: int) -> bool:
        """Whether the token budget allows this number of rows of this length in one pass."""
        return self.token_budget is None or rows * length <= self.token_budget

    def is_plain(self, rows: int, length: int) -> bool:
        """Whether the plain joint forward of this number of member-major rows is enough."""
        return self.kind == "dense" and self.takes(rows, length)

    def parts(self, batch: Batch, num_members: int) -> list[Batch]:
        """Cut a batch by examples, so that a pass of each part under all members fits the token budget.

        The examples of one part have similar lengths. If there are several parts, each has its share under `SHARE` and
        the places of its examples under `PLACES`.
        """
        rows, length = batch["input_ids"].shape
        if self.takes(num_members * rows, length) or rows == self.rows_per_example:
            return [batch]
        assert self.token_budget is not None
        most = self.token_budget // (num_members * self.rows_per_example * length)
        examples = torch.arange(rows // self.rows_per_example)
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(dim=1).view(self.rows_per_example, -1).amax(dim=0)
            examples = lengths.argsort(descending=True, stable=True).cpu()
        return [
            take_examples(batch, at, self.rows_per_example) | {SHARE: len(at) / len(examples), PLACES: at}
            for at in examples.split(max(1, most))
        ]


def share_of(batch: Mapping[str, Any]) -> float:
    """The share of its batch that a part from `RoutingPlan.parts` holds; 1 for a whole batch."""
    return batch.get(SHARE, 1.0)


def take_examples(batch: Batch, examples: Tensor, rows_per_example: int = 1) -> Batch:
    """Take some examples of a batch, and drop the columns that are padding in all of their rows."""
    many = len(batch["input_ids"])
    of_pairs = many // rows_per_example
    rows = torch.cat([examples + part * of_pairs for part in range(rows_per_example)])

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) not in (many, of_pairs):
            return value
        return value[rows.to(value.device) if len(value) == many else examples.to(value.device)]

    part = {name: taken(value) for name, value in batch.items()}
    mask = part.get("attention_mask")
    if mask is None:
        return part
    length, longest = mask.shape[1], int(mask.any(dim=0).nonzero().amax()) + 1
    wide = {k for k, v in part.items() if isinstance(v, Tensor) and v.dim() == 2 and v.shape[1] == length}
    return {k: v[:, :longest] if k in wide else v for k, v in part.items()}
