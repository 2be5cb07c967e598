"""Which answers belong to another prompt: those that gain no more from their own than a mismatched answer would.

Read next: `measuring.py`, where the likelihoods come from, and `judging.py`, which makes groups of the result.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

QUANTILES = (0.9, 0.8, 0.7, 0.6)  # of what mismatched answers gain: the limit is one of these, or no gain at all
MOST = 0.1  # share of rows that may be below a limit; errors are few, so of more rows most would be called wrongly


class Gains(NamedTuple):
    """What n answers gain from their own prompts.

    Attributes:
        nats: log-likelihood after the own prompt less the mean after R prompts of other rows, [n]; NaN without such
            prompts.
        limit: answers that gain less are called mismatched, nats.
        rank: share of mismatched answers that would gain less, in [0, 1], [n]; 1 where `nats` is NaN.
    """

    nats: Floats
    limit: float
    rank: Floats

    @property
    def is_mismatched(self) -> NDArray[np.bool_]:
        below: NDArray[np.bool_] = self.nats <= self.limit  # NaN is not
        return below


def gains_of(own_n: Floats, rivals_Rn: Floats) -> Gains:
    """The gains of n answers, and from which gain on an answer belongs to its prompt.

    What a mismatched answer gains is known, because every answer has been tried with wrong prompts: the difference
    between two of them, scaled to the variance of a gain, σ²(1 + 1/R). Nine mismatched answers in ten gain less than
    the 0.9 quantile of these differences. That is the limit if few rows are below it. Where answers gain little by
    themselves (labels, yes and no), many are below it. Then lower quantiles are tried, and at last no gain at all. If
    more than a tenth of the answers gain nothing, prompts say too little about answers here, and the limit is −∞.

    Args:
        own_n: log-likelihood of each answer after its own prompt, nats.
        rivals_Rn: after each of R ≥ 2 prompts of other rows, nats; NaN where there is none.
    """
    nats = own_n - rivals_Rn.mean(axis=0)
    known = ~np.isnan(nats)
    if not known.any():
        return Gains(nats, 0.0, np.ones_like(nats))
    rivals, number = rivals_Rn[:, known], len(rivals_Rn)
    differences = np.concatenate([rivals[a] - rivals[b] for a, b in combinations(range(number), 2)])
    mismatched = np.concatenate([differences, -differences]) * np.sqrt((1 + 1 / number) / 2)
    limits = [*np.quantile(mismatched, QUANTILES).tolist(), 0.0]
    limit = next((limit for limit in limits if np.mean(nats[known] <= limit) <= MOST), -np.inf)
    rank = np.ones_like(nats)
    rank[known] = np.searchsorted(np.sort(mismatched), nats[known]) / len(mismatched)
    return Gains(nats, limit, rank)
