"""The settings of routing, and the cutting of a batch into parts. Read next: `router.py`, which runs a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi.labels import IGNORED

ROUTINGS = ("dense", "sampled", "sparse", "raced", "auto")
SHARE = "share_of_batch"  # a key in a part of a batch: the part's number of examples divided by the whole batch's
PLACES = "places_in_batch"  # a key in a part of a batch: the places of its examples in the whole batch
ROUTED_ROW = "routed_row"  # a key in a batch: the numbers of its rows in their prepared dataset

Batch = dict[str, Any]  # the arguments of a joint forward


@dataclass(frozen=True)
class RoutingPlan:
    """Which pairs of M members and E examples a training step runs.

    Attributes:
        kind: one of `ROUTINGS`.
            "dense": every pair.
            "sampled": one member per example. It is drawn by its share of the gradient and weighted with the inverse of
            that share, so the gradient is unbiased.
            "sparse": the pairs whose share is at least `threshold`, or every pair while most have it.
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
        lengths_E = row_lengths(batch).view(self.rows_per_example, -1).amax(dim=0)
        examples = lengths_E.argsort(descending=True, stable=True)
        return [part_of(batch, at, self.rows_per_example) for at in examples.split(max(1, most))]


def split(part: Batch, is_first_E: Tensor) -> list[Batch]:
    """A batch of rows, or a part of one, in two parts by a property of its rows [E]; in one if all have it, or none."""
    if is_first_E.all() or not is_first_E.any():
        return [part]
    return [part_of(part, at.nonzero().flatten()) for at in (is_first_E, ~is_first_E)]


def part_of(batch: Batch, examples: Tensor, rows_per_example: int = 1) -> Batch:
    """Some examples of a batch, or of a part of one, with their share of the whole batch and their places in it."""
    number = len(batch["input_ids"]) // rows_per_example
    places_E = batch.get(PLACES, torch.arange(number))
    share = share_of(batch) * len(examples) / number
    return take_examples(batch, examples, rows_per_example) | {SHARE: share, PLACES: places_E[examples]}


def share_of(batch: Mapping[str, Any]) -> float:
    """The share of its batch that a part from `RoutingPlan.parts` holds; 1 for a whole batch."""
    return batch.get(SHARE, 1.0)


def row_lengths(batch: Batch) -> Tensor:
    """The tokens of each row [B], on the CPU: up to its last one that is no padding."""
    ids_BT, mask_BT = batch["input_ids"], batch.get("attention_mask")
    rows, length = ids_BT.shape
    if mask_BT is None:
        return torch.full((rows,), length)
    return ((mask_BT != 0) * torch.arange(1, length + 1, device=mask_BT.device)).amax(dim=1).cpu()


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a row holds several examples. `position_ids` then say where each begins."""
    return "position_ids" in batch


def unpacked(batch: Batch) -> Batch:
    """The examples of packed rows, each as a row of its own; without those of which no token is trained.

    Examples keep the places of their packed rows in the optimizer step, under `PLACES`, so that noise of random members
    is the same as in packed rows.
    """
    ids_BT, labels_BT, begins_N = batch["input_ids"], batch["labels"], (batch["position_ids"] == 0).flatten()
    starts_E = begins_N.nonzero().flatten()
    ends_E = torch.cat([starts_E[1:], starts_E.new_tensor([ids_BT.numel()])])
    trained_N = ((labels_BT != IGNORED).flatten() & ~begins_N).cumsum(0)
    trained_E = trained_N[ends_E - 1] - trained_N[starts_E]
    kept_E = trained_E > 0 if trained_E.any() else torch.ones_like(trained_E, dtype=torch.bool)
    starts_E, ends_E = starts_E[kept_E], ends_E[kept_E]
    at_ET = starts_E[:, None] + torch.arange(int((ends_E - starts_E).amax()), device=starts_E.device)
    is_there_ET = at_ET < ends_E[:, None]
    at_ET = at_ET.where(is_there_ET, starts_E[:, None])
    return {
        "input_ids": ids_BT.flatten()[at_ET].masked_fill(~is_there_ET, 0),
        "labels": labels_BT.flatten()[at_ET].masked_fill(~is_there_ET, IGNORED),
        "attention_mask": is_there_ET.long(),
        PLACES: starts_E.cpu() // ids_BT.shape[1],
    }


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
