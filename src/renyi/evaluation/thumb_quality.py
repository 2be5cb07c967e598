"""How well an ensemble foretells thumbs, how well its members do, and whether it knows where it is wrong.

A thumb is a question with two answers, down and up, so most figures are those of `choice_quality.py`. Read next:
`renyi.inference.thumb_scores`, which gives the probabilities.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from renyi.evaluation import bootstrap, metrics
from renyi.evaluation.bootstrap import RESAMPLES, Estimate, intervals
from renyi.evaluation.choice_quality import ChoiceEvaluation, Opinion, evaluate_choice


class ThumbEvaluation(NamedTuple):
    """What `evaluate_thumbs` finds.

    Attributes:
        up: share of thumbs up.
        auroc: of each system with a single temperature: how well its probability of thumbs up ranks thumbs up above
            thumbs down; 1/2 for not at all. NaN if all thumbs point the same way.
        figures: accuracy, NLL, calibration and the rest, of the mixture, its members, the baselines, and a single
            member with its temperature, each half of the thumbs at one that was fitted on the other half. The Brier
            score is (1 − p)², from 0 to 1; a coin has 1/4.
    """

    up: float
    auroc: dict[str, Estimate]
    figures: ChoiceEvaluation


def evaluate_thumbs(
    ensemble: Opinion,
    is_up: Sequence[bool],
    *,
    baselines: Mapping[str, Opinion] | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ThumbEvaluation:
    """Evaluate an ensemble, each of its members and baselines on the same thumbs.

    Args:
        ensemble: its opinion on N thumbs: log-probabilities of thumbs down and up, [M, N, 2].
        is_up: whether each thumb is up, [N].
        baselines: other ensembles, or single adapters, on the same thumbs, by name.
        groups: the group of each thumb, such as its user, [N].
        resamples: draws for the intervals.
        seed: of the draws, and of the halves that temperatures are fitted on.

    Raises:
        ValueError: lengths do not match.
    """
    up_N, rivals = np.asarray(is_up, bool), baselines or {}
    given = {"baselines": rivals, "groups": groups, "resamples": resamples, "seed": seed}
    figures = evaluate_choice(ensemble, up_N.astype(int).tolist(), cross_fitted=True, **given)  # type: ignore[arg-type]
    halved = [s._replace(brier=Estimate(*(x / 2 for x in s.brier))) for s in figures.systems]
    members = range(len(ensemble.weights)) if len(ensemble.weights) > 1 else ()
    opinions = {"mixture": ensemble, **{f"member {m}": ensemble.alone(m) for m in members}, **rivals}

    def auroc(opinion: Opinion) -> Estimate:
        p_N = opinion.mixture()[:, 1]
        value, statistic = metrics.auroc(p_N, up_N), bootstrap.auroc(p_N, up_N)
        return intervals({"auroc": value}, {"auroc": statistic}, len(up_N), resamples, seed)["auroc"]

    found = {name: auroc(opinion) for name, opinion in opinions.items()}
    return ThumbEvaluation(float(up_N.mean()), found, figures._replace(systems=halved))
