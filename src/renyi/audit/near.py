"""Prompts that are nearly the same: candidates by MinHash, then an exact comparison of their words.

Read next: `reading.py`, which compares the answers to such prompts.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from renyi.audit.statements import deciding, words_of

PERMUTATIONS = 64
BLOCK = 8192  # digests that are computed at a time
BEGINNING = 240  # characters of an answer that are compared
# Prompts with their answers that share fewer of their words are not compared: in a large dataset they are too many.
ALIKE_WHOLE = 0.55
COUNTED = 50_000  # prompts whose words are counted
# Prompts whose answers share this many of their words, if they have so many, ask the same if they share so many theirs.
ALIKE_ANSWERS, FEWEST_WORDS, COPIED = 0.5, 3, 0.35


class NearIndex:
    """Digests of word sets, which are added one by one.

    A digest has 64 minima. Two sets of Jaccard similarity s agree in a share s of them on average. They agree in all
    r minima of at least one of b = 64/r bands with probability 1 − (1 − sʳ)ᵇ: 0.9998 at s = 0.8 and r = 4, 0.94 at
    s = 0.5 and r = 3.
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
            numbers, size = chain.from_iterable(matrix.to_rows()), len(self._waiting) * PERMUTATIONS
            self._digests.append(np.fromiter(numbers, np.uint32, size).reshape(-1, PERMUTATIONS))
            self._waiting = []

    def candidates(self, threshold: float, rows_a_band: int = 4) -> NDArray[np.int64]:
        """Pairs [n, 2] of sets that may have a Jaccard similarity of at least `threshold`, each once.

        Both sets of a pair share a band. The share of minima in which they agree is at most three standard errors below
        the threshold. Bands of fewer rows find sets that are less similar. Only sets that lie at most
        three places apart in a band's bucket are paired, so the work is linear in the number of sets.
        """
        self._digest()
        if not self._digests:
            return np.empty((0, 2), dtype=np.int64)
        digests_ND = np.concatenate(self._digests)
        self._digests = []
        found = []
        for start in range(0, PERMUTATIONS - rows_a_band + 1, rows_a_band):
            band = np.ascontiguousarray(digests_ND[:, start : start + rows_a_band])
            # Sorted by this band, then by the next band: so the most similar sets of a large bucket are neighbours.
            beside = digests_ND[:, (start + rows_a_band) % PERMUTATIONS]
            order = np.lexsort((beside, *band.T))
            a, b = (
                np.concatenate(ends) for ends in zip(*(_together(band, order, gap) for gap in (1, 2, 3)), strict=True)
            )
            alike = np.concatenate(
                [
                    (digests_ND[a[i : i + BLOCK]] == digests_ND[b[i : i + BLOCK]]).sum(axis=1, dtype=np.uint8)
                    for i in range(0, max(1, len(a)), BLOCK)
                ]
            )
            least = threshold - 3 * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
            likely = alike >= least * PERMUTATIONS
            found.append(np.sort(np.stack([a[likely], b[likely]], axis=1), axis=1))
        return np.unique(np.concatenate(found), axis=0)


def _together(band: NDArray[np.uint32], order: NDArray[np.int64], gap: int) -> tuple[NDArray[np.int64], ...]:
    """The sets that lie `gap` places apart in one bucket."""
    first, second = order[:-gap], order[gap:]
    same = (band[first] == band[second]).all(axis=1)
    return first[same], second[same]


class Rarity:
    """How rare words are in prompts: log(1 + n / f), for a word that f of n prompts have.

    Only the first `COUNTED` prompts are counted, so that the memory is bounded.
    """

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._prompts = 0

    def add(self, words: frozenset[str]) -> None:
        if self._prompts < COUNTED:
            self._prompts += 1
            self._count.update(words)

    def __call__(self, word: str) -> float:
        return math.log1p(self._prompts / max(1, self._count[word]))


def near_groups(
    prompts: NearIndex,
    whole: NearIndex,
    text: Callable[[int], tuple[str, str]],
    size: int,
    threshold: float,
    rarity: Callable[[str], float],
) -> list[list[int]]:
    """Groups of prompts that are linked: they ask nearly the same.

    Two prompts do if they share enough words, or if they share fewer and their answers are nearly the same as well. The
    second is how a row looks that was copied in other words and with another fact. Rare words count for more there,
    because many prompts of one form, about other things each, also share many words; and no answer repeats a word that
    only its own prompt has. In both cases the deciding words are equal.

    Args:
        prompts: of the words of N prompts.
        whole: of `words_of_both` of the same prompts and their answers.
        text: prompt and answer at a place, 0 to N − 1.
        size: N.
        threshold: least Jaccard similarity of the words of two prompts, in (0, 1].
        rarity: of a word in prompts.
    """
    links = {(a, b) for a, b in prompts.candidates(threshold).tolist() if _alike(text(a)[0], text(b)[0], threshold)}
    links |= {
        (a, b) for a, b in whole.candidates(ALIKE_WHOLE, rows_a_band=3).tolist() if _copied(text(a), text(b), rarity)
    }
    return groups_of(sorted(links), size)


def words_of_both(asked: frozenset[str], answer: str) -> frozenset[str]:
    """The words of a prompt, which are given, and of the beginning of its answer, told apart."""
    return asked | {f"\0{word}" for word in words_of(answer[:BEGINNING])}


def _alike(one: str, other: str, threshold: float) -> bool:
    return _shared(words_of(one), words_of(other)) >= threshold and deciding(one).is_same(deciding(other))


def _copied(one: tuple[str, str], other: tuple[str, str], rarity: Callable[[str], float]) -> bool:
    asked = words_of(one[0]), words_of(other[0])
    answers = words_of(one[1][:BEGINNING]), words_of(other[1][:BEGINNING])
    # An answer that repeats a word of its own prompt alone is about that word.
    speaks_of_its_own = (asked[0] - asked[1]) & answers[0] or (asked[1] - asked[0]) & answers[1]
    return (
        answers[0] != answers[1]
        and len(answers[0]) >= FEWEST_WORDS
        and not speaks_of_its_own
        and _shared(*answers) >= ALIKE_ANSWERS
        and _shared(*asked, rarity) >= COPIED
        and deciding(one[0]).is_same(deciding(other[0]))
    )


def _shared(first: frozenset[str], second: frozenset[str], weight: Callable[[str], float] = lambda word: 1.0) -> float:
    """The Jaccard similarity of two sets of words, whose words may count differently."""
    return sum(map(weight, first & second)) / sum(map(weight, first | second))


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
