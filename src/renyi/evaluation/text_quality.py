"""How likely text is to the mixture and to every member, per token, by group, with intervals over examples.

Read next: `renyi.inference.score`, which gives the scores.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from renyi.evaluation import bootstrap
from renyi.evaluation.bootstrap import RESAMPLES, Estimate
from renyi.evaluation.member_groups import Specialisation, rows_by_group, specialisation
from renyi.inference import Score


class TextQuality(NamedTuple):
    """The mixture, a member or a baseline on N examples: NLL in nats per token, and the perplexity, exp of it.

    In a mixture of sequences a whole example has one weight, so NLL per token is Σ_i −log Σ_m π_m p_m(y_i) / tokens.
    """

    name: str
    nll: Estimate
    perplexity: Estimate


class TextGroup(NamedTuple):
    """One group: examples, tokens; NLL a token of the mixture and of each member [M]; Jensen gap a token."""

    group: str
    examples: int
    tokens: int
    nll: float
    members: list[float]
    jensen_gap: float


class PerplexityEvaluation(NamedTuple):
    """What `evaluate_perplexity` finds.

    Attributes:
        examples, tokens: how many.
        systems: the mixture, its members if more than one, and the baselines' mixtures.
        jensen_gap: mean member NLL − mixture NLL, nats a token.
        most_contested: `Score.index` of all examples, those with the largest Jensen gap a token first.
        groups, specialisation: by group, if groups were given.
    """

    examples: int
    tokens: int
    systems: list[TextQuality]
    jensen_gap: float
    most_contested: list[int]
    groups: list[TextGroup] | None = None
    specialisation: Specialisation | None = None


def evaluate_perplexity(
    scores: Sequence[Score],
    weights: Tensor,
    *,
    baselines: Mapping[str, Sequence[Score]] | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PerplexityEvaluation:
    """Evaluate the likelihood of text.

    Args:
        scores: of N ≥ 1 examples under M members, as `renyi.inference.score` gives them.
        weights: the ensemble's mixture weights [M].
        baselines: scores of the same examples under other ensembles, by name.
        groups: the group of each example, [N].
        resamples: draws of examples for the intervals.
        seed: of the draws.
    """
    tokens_N = np.array([s.tokens for s in scores], np.float64)
    nll_N = np.array([s.mixture_nll for s in scores], np.float64)
    gap_N = np.array([s.jensen_gap for s in scores], np.float64)
    ell_MN = np.array([s.log_likelihood for s in scores], np.float64).T

    def quality(name: str, nll: np.ndarray) -> TextQuality:
        value, statistic = nll.sum() / tokens_N.sum(), bootstrap.ratio(nll, tokens_N)
        found = bootstrap.intervals({"nll": float(value)}, {"nll": statistic}, len(nll), resamples, seed)["nll"]
        return TextQuality(name, found, Estimate(*np.exp(found).tolist()))

    systems = [quality("mixture", nll_N)]
    if len(ell_MN) > 1:
        systems += [quality(f"member {m}", -ell_N) for m, ell_N in enumerate(ell_MN)]
    for name, other in (baselines or {}).items():
        systems.append(quality(name, np.array([s.mixture_nll for s in other])))
    worst_first = np.argsort(-gap_N / tokens_N, kind="stable")
    return PerplexityEvaluation(
        examples=len(scores),
        tokens=int(tokens_N.sum()),
        systems=systems,
        jensen_gap=float(gap_N.sum() / tokens_N.sum()),
        most_contested=[scores[i].index for i in worst_first],
        groups=None if groups is None else _groups(groups, tokens_N, nll_N, ell_MN, gap_N),
        specialisation=None if groups is None else specialisation(ell_MN, weights.detach().cpu(), groups),
    )


def _groups(
    groups: Sequence[str], tokens_N: np.ndarray, nll_N: np.ndarray, ell_MN: np.ndarray, gap_N: np.ndarray
) -> list[TextGroup]:
    found = []
    for name, rows in rows_by_group(groups).items():
        tokens = tokens_N[rows].sum()
        members = (-ell_MN[:, rows].sum(axis=1) / tokens).tolist()
        sums = (float(x[rows].sum() / tokens) for x in (nll_N, gap_N))
        nll, gap = sums
        found.append(TextGroup(name, len(rows), int(tokens), nll, members, gap))
    return found
