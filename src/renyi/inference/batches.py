"""Batches under a budget of tokens: rows of like length together, because padding is computed like any other token.

Every function of `renyi.inference` that scores rows uses these; `score.py` is the shortest.
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
    """Rows as one tensor [B, T], filled up on their right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
