"""Batches that keep the rows of a group together, and a collator that passes on what groups and votes need.

Read next: `renyi.routing.groups`, what a group shares.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class GroupBatches(Sampler[list[int]]):
    """Batches of at most `batch_size` rows in which groups are whole, in another random order every epoch.

    A group of more rows than a batch is cut into parts as equal as can be. Parts and groups are put into batches by
    their sizes, the greatest first (first fit decreasing). Which group of a size goes where is drawn anew every epoch,
    so the number of batches is the same in all of them. Groups of one row give the order of a plain random sampler.

    Args:
        groups: the group of each row, [N].
        batch_size: the most rows of a batch.
        seed: of the order.
        drop_last: leave out batches that are not full.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int, drop_last: bool = False):
        self.batch_size, self.drop_last, self.seed, self.epoch = batch_size, drop_last, seed, 0
        self._rows: dict[int, list[int]] = defaultdict(list)
        for row, group in enumerate(groups):
            self._rows[group].append(row)
        sizes = [size for rows in self._rows.values() for size in _part_sizes(len(rows), batch_size)]
        self._plan: list[list[int]] = _packed(sizes, batch_size)
        if drop_last:
            self._plan = [sizes for sizes in self._plan if sum(sizes) == batch_size]

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch + self.seed)
        number = sum(map(len, self._rows.values()))
        place = torch.empty(number, dtype=torch.long)
        place[torch.randperm(number, generator=generator)] = torch.arange(number)
        waiting: dict[int, list[list[int]]] = defaultdict(list)
        order = place.tolist()
        for rows in sorted(self._rows.values(), key=lambda rows: min(order[row] for row in rows)):
            shuffled, start = sorted(rows, key=order.__getitem__), 0
            for size in _part_sizes(len(rows), self.batch_size):
                waiting[size].append(shuffled[start : start + size])
                start += size
        taken: dict[int, int] = defaultdict(int)
        batches = []
        for sizes in self._plan:
            batch: list[int] = []
            for size in sizes:
                batch += waiting[size][taken[size]]
                taken[size] += 1
            batches.append(batch)
        if len(waiting) > 1:  # otherwise the batches are in random order already
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        self.epoch += 1
        yield from batches


def _part_sizes(rows: int, most: int) -> list[int]:
    parts = -(-rows // most)
    return [rows // parts + (part < rows % parts) for part in range(parts)]


def _packed(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Sizes in bins of at most `most`, by first fit decreasing."""
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # bins by the room that is left in them
    for size in sorted(sizes, reverse=True):
        room = next((r for r in range(size, most + 1) if with_room[r]), None)
        if room is None:
            bins.append([])
            at, room = len(bins) - 1, most
        else:
            at = with_room[room].pop()
        bins[at].append(size)
        with_room[room - size].append(at)
    return bins


class WithColumns:
    """A collator that also makes a tensor of each of some columns of numbers, if the rows have it."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: Sequence[str]):
        self.inner, self.columns = inner, tuple(columns)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        kept: dict[str, Tensor] = {c: torch.tensor([row[c] for row in rows]) for c in self.columns if c in rows[0]}
        if not kept:
            return self.inner(rows)
        plain = [{name: value for name, value in row.items() if name not in kept} for row in rows]
        return {**self.inner(plain), **kept}
