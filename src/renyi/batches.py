"""Batches under a budget of tokens. Rows of similar length go together, because padding costs as much as other tokens.

Whatever scores rows uses these, and so do training steps that run in parts. `inference/score.py` is the shortest.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, such that a batch padded to its longest row has at most `tokens` tokens.

    A single row that is longer than that makes a batch of its own.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows as one tensor [B, T], filled on the right with `value`."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
