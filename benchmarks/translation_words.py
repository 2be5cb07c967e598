"""Why members part over content or memory and not over the translation: the same question with a model that is exact.

    python benchmarks/translation_words.py [--data FOLDER] [--seeds 0 1 2 3 4]

Three members that are only distributions of words, fitted by expectation–maximisation at α = 0.8 to the verses of
`translations.py` (seconds, no language model). Each verse is in the rows in one translation. A row has a responsibility
of its own, or shares one: with k rows of one translation from anywhere (an annotator's), or with the verses of its
chapter in the same translation (a document's).

    plain       40 passes over the rows
    unseen      the same, but a group's responsibility is of members from which the group's own words are taken out,
                so that memory gains nothing
    one pass    members learn from one group after the other, each once, with α held at 0 for a fifth and ramped for a
                fifth, as in training
    told        the responsibilities are the translations

Printed: the adjusted Rand index of best member and translation on held-out chapters, by document of eight verses and by
verse; mean and range over seeds.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from translations import DOCUMENT, SOURCES, Row, Verse, documents, read_verses, split

ALPHA, ITERATIONS, RAREST, ADDED = 0.8, 40, 3, 0.3


def counted(rows: Sequence[Row], words: dict[str, int]) -> sp.csr_matrix:
    """How often each row has each word, [N, V]."""
    at = [(n, words[w]) for n, row in enumerate(rows) for w in in_words(row) if w in words]
    row_N, word_N = zip(*at, strict=True)
    return sp.csr_matrix((np.ones(len(at)), (row_N, word_N)), shape=(len(rows), len(words)))


def in_words(row: Row) -> list[str]:
    return re.findall(r"[A-Za-z]+|[^\sA-Za-z]", row.verse.texts[row.source])


def once_each(chapters: Sequence[Sequence[Verse]], number: int, seed: int) -> list[Row]:
    rng, rows = random.Random(seed), list[Row]()
    for chapter in chapters:
        mixed, first = rng.sample(list(chapter), len(chapter)), rng.randrange(len(SOURCES))
        rows += [Row(v, (first + i) % len(SOURCES)) for i, v in enumerate(mixed)]
    return rows[:number]


def grouped(rows: Sequence[Row], kind: str, size: int, seed: int) -> NDArray[np.int64]:
    """The group of each row, a number, [N]."""
    if kind == "document":
        names = [(row.verse.book, row.verse.chapter, row.source) for row in rows]
    else:
        place, seen = np.random.default_rng(seed).permutation(len(rows)), Counter[int]()
        names = [("", "", 0)] * len(rows)
        for n in place:
            source = rows[n].source
            names[n] = ("", str(seen[source] // size), source)
            seen[source] += 1
    numbers = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([numbers[name] for name in names])


def fitted(words_GV: sp.coo_matrix, unseen: bool, seed: int) -> NDArray[np.float64]:
    """log p_m(word), [M, V], by expectation–maximisation over groups, given how often each group has each word."""
    (groups, _), members = words_GV.shape, len(SOURCES)
    length_G = np.bincount(words_GV.row, words_GV.data, groups)
    r_GM = np.full((groups, members), 1 / members) + np.random.default_rng(seed).normal(0, 0.02, (groups, members))
    r_GM = r_GM / r_GM.sum(1, keepdims=True)
    for _ in range(ITERATIONS):
        counts_MV = (words_GV.T @ r_GM).T + ADDED
        own_GM = r_GM if unseen else np.zeros_like(r_GM)  # the share of the group's own words that is taken out
        ell_GM = np.empty_like(r_GM)
        for m in range(members):
            counts = counts_MV[m, words_GV.col] - own_GM[words_GV.row, m] * words_GV.data
            total_G = counts_MV[m].sum() - own_GM[:, m] * length_G
            ell_GM[:, m] = np.bincount(words_GV.row, words_GV.data * np.log(counts), groups) - length_G * np.log(
                total_G
            )
        r_GM = np.exp(ALPHA * (ell_GM - ell_GM.max(1, keepdims=True)))
        r_GM = r_GM / r_GM.sum(1, keepdims=True)
    counts_MV = (words_GV.T @ r_GM).T + ADDED
    return np.log(counts_MV / counts_MV.sum(1, keepdims=True))


def in_one_pass(words_GV: sp.csr_matrix, seed: int) -> NDArray[np.float64]:
    """The same, from one visit to each group in random order."""
    (groups, vocabulary), members = words_GV.shape, len(SOURCES)
    rng = np.random.default_rng(seed)
    counts_MV = ADDED + rng.gamma(1.0, 0.05, (members, vocabulary))
    for step, group in enumerate(rng.permutation(groups)):
        own = slice(words_GV.indptr[group], words_GV.indptr[group + 1])
        words, numbers = words_GV.indices[own], words_GV.data[own]
        ell_M = np.log(counts_MV[:, words]) @ numbers - numbers.sum() * np.log(counts_MV.sum(1))
        alpha = ALPHA * min(1.0, max(0.0, step / groups - 0.2) / 0.2)
        r_M = np.exp(alpha * (ell_M - ell_M.max()))
        counts_MV[:, words] += members * np.outer(r_M / r_M.sum(), numbers)
    return np.log(counts_MV / counts_MV.sum(1, keepdims=True))


def found(ell_NM: NDArray[np.float64], num_documents: int) -> tuple[float, float]:
    """ARI by document and by verse, of rows in the order document, verse, translation."""
    sources, members = len(SOURCES), ell_NM.shape[1]
    ell_DM = ell_NM.reshape(num_documents, DOCUMENT, sources, members).sum(1).reshape(-1, members)
    return (
        adjusted_rand_score(np.tile(range(sources), num_documents), ell_DM.argmax(1)),
        adjusted_rand_score(np.tile(range(sources), num_documents * DOCUMENT), ell_NM.argmax(1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "translations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    verses = read_verses(args.data, "reference")
    print("groups                 rows  responsibilities  ARI of 8 verses          ARI of a verse")
    shapes = [("row", 1), ("document", 0), *(("annotator", k) for k in (2, 4, 8, 16))]
    for number in (1600, 4000):
        figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for seed in args.seeds:
            train, test = split(verses, seed)
            rows, held_out = once_each(train, number, seed), documents(test, 60)
            test_rows = [Row(v, s) for document in held_out for v in document for s in range(len(SOURCES))]
            frequency = Counter(w for row in rows for w in in_words(row))
            words = {w: i for i, w in enumerate(sorted(w for w, n in frequency.items() if n >= RAREST))}
            x_NV, test_NV = counted(rows, words), counted(test_rows, words)
            for kind, size in shapes:
                group_N = grouped(rows, kind, size, seed)
                to_groups = sp.csr_matrix((np.ones(len(rows)), (group_N, np.arange(len(rows)))))
                words_GV = (to_groups @ x_NV).tocsr()
                ways = {
                    "plain": fitted(words_GV.tocoo(), False, seed),
                    "unseen": fitted(words_GV.tocoo(), True, seed),
                    "one pass": in_one_pass(words_GV, seed),
                }
                for way, log_p_MV in ways.items():
                    key = f"{kind}{f' of {size} rows' if size > 1 else ''}", way
                    figures.setdefault(key, []).append(found(test_NV @ log_p_MV.T, len(held_out)))
            told_MV = np.stack([np.asarray(x_NV[[r.source == s for r in rows]].sum(0))[0] for s in range(3)]) + ADDED
            log_p_MV = np.log(told_MV / told_MV.sum(1, keepdims=True))
            figures.setdefault(("translation", "told"), []).append(found(test_NV @ log_p_MV.T, len(held_out)))
        for (groups, responsibilities), values in figures.items():
            columns = " ".join(f"{np.mean(v):8.3f} [{min(v):6.3f}, {max(v):6.3f}]" for v in zip(*values, strict=True))
            print(f"{groups:22} {number:4}  {responsibilities:16} {columns}", flush=True)


if __name__ == "__main__":
    main()
