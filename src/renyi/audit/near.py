"""Prompts that are nearly the same: candidates by MinHash, then an exact comparison of their words.

Read next: `reading.py`, which compares the answers to such prompts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from renyi.audit.statements import deciding, words_of

PERMUTATIONS, ROWS_A_BAND = 64, 4
BLOCK = 8192  # digests that are computed at a time


class NearIndex:
    """Digests of word sets, which are added one by one.

    A digest has 64 minima. Two sets of Jaccard similarity s agree in a share s of them on average. They agree in all
    four minima of at least one of 16 bands with probability 1 − (1 − s⁴)¹⁶, which is 0.9998 at s = 0.8.
    """

    def __init__(self, seed: int = 0):
        self._seed = seed
        self._waiting: list[list[str]] = []
        self._digests: list[NDArray[np.uint32]] = []

    def add(self, words: frozenset[str]) -> None:
        self._waiting.append(list(words))
        if len(self._waiting) == BLOCK:
            self._digest()

    def _digest(self) -> None:
        if self._waiting:
            matrix = RMinHash.digest_matrix_from_token_sets(self._waiting, PERMUTATIONS, self._seed)
            self._digests.append(np.array(matrix.to_rows(), dtype=np.uint32))
            self._waiting = []

    def candidates(self, threshold: float) -> NDArray[np.int64]:
        """Pairs [n, 2] of sets that may have a Jaccard similarity of at least `threshold`, each once.

        Both sets of a pair share a band. The share of minima in which they agree is at most three standard errors below
        the threshold. Only neighbours in a band's bucket are paired, so the work is linear in the number of sets.
        """
        self._digest()
        if not self._digests:
            return np.empty((0, 2), dtype=np.int64)
        digests_ND = np.concatenate(self._digests)
        self._digests = []
        found = []
        for start in range(0, PERMUTATIONS, ROWS_A_BAND):
            band = np.ascontiguousarray(digests_ND[:, start : start + ROWS_A_BAND])
            # Sorted by this band, then by the next band: so the most similar sets of a large bucket are neighbours.
            beside = np.roll(digests_ND, -start - ROWS_A_BAND, axis=1)[:, 0]
            order = np.lexsort((beside, *band.T))
            same = (band[order[1:]] == band[order[:-1]]).all(axis=1)
            a, b = order[:-1][same], order[1:][same]
            alike = np.concatenate(
                [
                    (digests_ND[a[i : i + BLOCK]] == digests_ND[b[i : i + BLOCK]]).mean(axis=1)
                    for i in range(0, max(1, len(a)), BLOCK)
                ]
            )
            likely = alike >= threshold - 3 * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
            found.append(np.sort(np.stack([a[likely], b[likely]], axis=1), axis=1))
        return np.unique(np.concatenate(found), axis=0)


def near_groups(index: NearIndex, prompt: Callable[[int], str], size: int, threshold: float) -> list[list[int]]:
    """Groups of prompts that are linked: they share enough words, and their deciding words are equal.

    Args:
        index: of the words of N prompts.
        prompt: the prompt at a place, 0 to N − 1.
        size: N.
        threshold: least Jaccard similarity of their words, in (0, 1].
    """
    return groups_of(
        [(a, b) for a, b in index.candidates(threshold).tolist() if _alike(prompt(a), prompt(b), threshold)], size
    )


def _alike(one: str, other: str, threshold: float) -> bool:
    first, second = words_of(one), words_of(other)
    if len(first & second) < threshold * len(first | second):
        return False
    return deciding(one).is_same(deciding(other))


def groups_of(links: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """Connected components of two or more places, each ascending."""
    if not links:
        return []
    a, b = np.array(links, dtype=np.int64).T
    _, labels = connected_components(
        coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(size, size)), directed=False
    )
    linked = np.unique(np.concatenate([a, b]))
    order = linked[np.argsort(labels[linked], kind="stable")]
    edges = np.flatnonzero(np.diff(labels[order])) + 1
    return [part.tolist() for part in np.split(order, edges)]
