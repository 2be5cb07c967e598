"""What a model says of examples: how well each answer fits its prompt, which member explains it, and what it loads on.

The score of an answer compares two likelihoods of the same answer: after its own prompt, and after prompts of other
examples. A swapped answer is as likely after another prompt as after its own. A rare or a long answer is unlikely after
any prompt, and that is no fault. Read next: `judging.py`, which turns these figures into groups.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.utils.logging import is_progress_bar_enabled
from numpy.typing import NDArray
from scipy.special import expit, logsumexp
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from transformers import PreTrainedTokenizerBase

from renyi.audit.examples import Examples
from renyi.audit.kept import Kept
from renyi.audit.statements import deciding, normalised
from renyi.data import Limits, PairPreparation, Preparation
from renyi.ensemble import LoraEnsemble
from renyi.inference import PairScore, Score, score, score_pairs
from renyi.inference.diagnose import Pairs, loadings_along

RIVALS = 2  # prompts of other examples that an answer is tried with
BLOCK = 64  # examples whose figures are kept at a time
NEIGHBOURS, LEAST_SIMILAR = 4, 0.25  # candidates for prompts that ask the same: so many, and at least so similar

Progress = Callable[[int], object]
Floats = NDArray[np.float64]


class Judge(NamedTuple):
    """A model that reads examples.

    Attributes:
        ensemble: M members.
        tokenizer: of the base.
        preparation: how rows become tokens.
        pairs: what is needed to score preferences; None for other rows.
        unseen: places of the examples that it was not fitted to, ascending.
    """

    ensemble: LoraEnsemble
    tokenizer: PreTrainedTokenizerBase
    preparation: Preparation | PairPreparation
    pairs: Pairs | None
    unseen: Sequence[int]


class Reading(NamedTuple):
    """What a model says of n examples.

    Attributes:
        places: of the examples among all N, [n].
        tokens: trained tokens of each, [n].
        log_likelihood: of each answer, or of a pair's label, under each member, nats, [M, n].
        responsibilities: share of each that a member would learn from, [M, n].
        nll: of the mixture, nats, [n].
        rivals: log-likelihood of each answer after prompts of R other examples, under the mixture, nats, [R, n]; NaN
            for pairs and for texts without a prompt, and where all prompts are equal.
        epistemic: disagreement of the members about each, nats, [n]: the Jensen gap of an answer, the mutual
            information of a preference.
        fit: in [0, 1], [n]. Of an answer p / (p + q): p is its likelihood after its own prompt, q its mean likelihood
            after prompts of other examples. Of a pair the probability of its label. NaN for texts without a prompt.
    """

    places: list[int]
    tokens: Floats
    log_likelihood: Floats
    responsibilities: Floats
    nll: Floats
    rivals: Floats
    epistemic: Floats
    fit: Floats

    @property
    def unrelated(self) -> Floats:
        """Mean likelihood of each answer after prompts of other examples, as nats, [n]."""
        return mean_likelihood(self.rivals)

    @classmethod
    def joined(cls, parts: Sequence["Reading"]) -> "Reading":
        """Readings of different examples as one, in the order of their places."""
        order = np.argsort(np.concatenate([part.places for part in parts]), kind="stable")
        rest = [np.concatenate(field, axis=-1)[..., order] for field in list(zip(*parts, strict=True))[1:]]
        return cls(np.concatenate([part.places for part in parts])[order].tolist(), *rest)


def read_examples(
    judge: Judge, examples: Examples, places: Sequence[int], kept: Kept, name: str, seed: int, progress: Progress
) -> Reading:
    """What a model says of some examples.

    Args:
        judge: the model.
        examples: all of them; others lend their prompts.
        places: of the examples to read.
        kept: figures that were measured before, and where new ones go.
        name: of the model, in `kept`.
        seed: of the choice of other prompts.
        progress: called with the number of examples read.

    Raises:
        DataError, EnsembleFormatError: as `renyi.inference.score`.
    """
    has_prompts = examples.method == "sft" and "prompt" in examples.content[0]
    turns = examples.rivals(RIVALS, seed) if has_prompts else []
    is_rival = np.array([[turn[i] != i for i in places] for turn in turns])
    content = [examples.content[i] for i in places]
    for turn in turns:
        content += examples.with_prompts_of([turn[i] for i in places], places)
    tokens, n = _Tokens(judge, content), len(places)

    def compute(start: int, stop: int) -> dict[str, list[Any]]:
        rows = range(start, stop)
        if judge.pairs is not None:
            return _of_pairs(score_pairs(judge.ensemble, tokens.rows.select(rows), *judge.pairs))
        own = score(judge.ensemble, tokens.rows.select(rows))
        others = [mixture_nll(judge, tokens.rows.select([n * (t + 1) + i for i in rows])) for t in range(len(turns))]
        return _of_answers(own, np.where(is_rival[:, start:stop], -np.array(others), math.nan) if others else None)

    parts = []
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        part = kept.get(f"{name}/figures/{start}", lambda start=start, stop=stop: compute(start, stop))  # type: ignore[misc]
        parts.append(Reading(list(places[start:stop]), *(np.array(part[field]) for field in Reading._fields[1:])))
        progress(stop)
    return Reading.joined(parts)


def _of_pairs(pairs: Sequence[PairScore]) -> dict[str, list[Any]]:
    return {
        "tokens": [s.tokens for s in pairs],
        "log_likelihood": list(zip(*(s.log_likelihood for s in pairs), strict=True)),
        "responsibilities": list(zip(*(s.responsibilities for s in pairs), strict=True)),
        "nll": [s.mixture_nll for s in pairs],
        "rivals": [[math.nan] * len(pairs)] * RIVALS,
        "epistemic": [s.epistemic for s in pairs],
        "fit": [s.preference for s in pairs],
    }


def _of_answers(own: Sequence[Score], rivals_Rn: Floats | None) -> dict[str, list[Any]]:
    """Figures of answers from their scores, and from their log-likelihood after other prompts."""
    rivals = np.full((RIVALS, len(own)), math.nan) if rivals_Rn is None else rivals_Rn
    nll = np.array([s.mixture_nll for s in own])
    return {
        "tokens": [s.tokens for s in own],
        "log_likelihood": list(zip(*(s.log_likelihood for s in own), strict=True)),
        "responsibilities": list(zip(*(s.responsibilities for s in own), strict=True)),
        "nll": nll.tolist(),
        "rivals": rivals.tolist(),
        "epistemic": [s.jensen_gap for s in own],
        "fit": expit(-nll - mean_likelihood(rivals)).tolist(),
    }


def mean_likelihood(rivals_Rn: Floats) -> Floats:
    """log (1/R) Σ_r exp(ℓ_r), [n]."""
    mean: Floats = logsumexp(rivals_Rn, axis=0) - math.log(len(rivals_Rn))
    return mean


def prepared(judge: Judge, rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Rows as tokens, without a bar for each small block."""
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        dataset = Dataset.from_list(list(rows))
        return judge.preparation.prepare(dataset, judge.tokenizer, limits=Limits.of(judge.ensemble.base))
    finally:
        if shown:
            enable_progress_bars()


def mixture_nll(judge: Judge, rows: Dataset) -> list[float]:
    """NLL of the answers of prepared rows under the mixture, nats."""
    return [s.mixture_nll for s in score(judge.ensemble, rows)]


class _Tokens:
    """Rows as tokens, prepared together and only when they are needed."""

    def __init__(self, judge: Judge, content: Sequence[Mapping[str, Any]]):
        self._judge, self._content = judge, content

    @cached_property
    def rows(self) -> Dataset:
        return prepared(self._judge, self._content)


def laid(judge: Judge, examples: Examples, directions: Any, kept: Kept, name: str, progress: Progress) -> Floats:
    """What every example loads on each of k directions, [N, k]: the derivative of its log-likelihood."""
    parts: list[list[float]] = []
    tokens, n = _Tokens(judge, examples.content), len(examples.rows)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)

        def compute(start: int = start, stop: int = stop) -> list[list[float]]:
            found = loadings_along(judge.ensemble, tokens.rows.select(range(start, stop)), directions, judge.pairs)
            values: list[list[float]] = found[1].tolist()
            return values

        parts += kept.get(f"{name}/laid/{start}", compute)
        progress(stop)
    return np.array(parts)


# ---- Prompts that ask the same in other words ------------------------------------------------------------------------


class Alike(NamedTuple):
    """Two examples whose prompts may ask the same.

    Attributes:
        one, other: their places, one < other.
        exchange: how well each answer fits the other's prompt, as a share of how well it fits its own. Near 1, the two
            prompts ask the same; near 0, each answer belongs to its prompt alone.
    """

    one: int
    other: int
    exchange: float


def candidates(examples: Examples) -> list[tuple[int, int]]:
    """Pairs of examples with similar prompts, which may ask the same: `NEIGHBOURS` of each prompt at the most.

    Similar means: the cosine of their character n-grams, weighted by inverse document frequency, is at least
    `LEAST_SIMILAR`. Prompts that differ in a number or in a negation never ask the same, and equal prompts are left to
    reading.
    """
    prompts = [text.prompt or "" for text in examples.texts]
    if len(prompts) < 2 or not any(prompt.strip() for prompt in prompts):
        return []
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(prompts)
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(prompts)), metric="cosine").fit(vectors)
    distances, neighbours = near.kneighbors(vectors)
    found = set()
    for i, (of_distance, of_place) in enumerate(zip(distances, neighbours, strict=True)):
        for distance, j in zip(of_distance.tolist(), of_place.tolist(), strict=True):
            if i != j and 1 - distance >= LEAST_SIMILAR:
                found.add((min(i, j), max(i, j)))
    return [
        (i, j)
        for i, j in sorted(found)
        if normalised(prompts[i]) != normalised(prompts[j])
        and deciding(prompts[i]).values == deciding(prompts[j]).values
    ]


def exchanges(
    judges: Sequence[Judge],
    examples: Examples,
    reading: Reading,
    kept: Kept,
    progress: Progress,
) -> list[Alike]:
    """Every pair of candidates with how well their answers fit each other's prompts.

    Args:
        judges: that read every example between them; an answer is read by the one that read it before.
        examples: all N.
        reading: of all N.
        kept: as in `read_examples`.
        progress: called with the number of answers read.
    """
    pairs = candidates(examples)
    asked = [(i, j) for i, j in pairs] + [(j, i) for i, j in pairs]  # the prompt of the first, the answer of the second
    crossed: dict[tuple[int, int], float] = {}
    done = 0
    for number, judge in enumerate(judges):
        unseen = set(judge.unseen)
        of_judge = [(i, j) for i, j in asked if j in unseen]
        content = examples.with_prompts_of([i for i, _ in of_judge], [j for _, j in of_judge])
        tokens = _Tokens(judge, content)
        for start in range(0, len(of_judge), BLOCK):
            block = of_judge[start : start + BLOCK]
            rows = range(start, start + len(block))

            def compute(judge: Judge = judge, tokens: _Tokens = tokens, rows: range = rows) -> list[float]:
                return [-x for x in mixture_nll(judge, tokens.rows.select(rows))]

            values = kept.get(f"exchange/{number}/{start}", compute)
            crossed.update(zip(block, values, strict=True))
            done += len(block)
            progress(done)
    own, unrelated = -reading.nll, reading.unrelated
    alike = []
    for i, j in pairs:
        gained = sum(max(0.0, crossed[a, b] - unrelated[b]) for a, b in ((i, j), (j, i)))
        possible = sum(max(0.0, own[b] - unrelated[b]) for b in (i, j))
        alike.append(Alike(i, j, gained / possible if possible > 0 else 0.0))
    return alike
