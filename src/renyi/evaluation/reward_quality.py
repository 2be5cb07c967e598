"""Which reward of an ensemble of reward models orders pairs best, and what the members' spread says.

Read next: `preference_quality.py`, which evaluates the probabilities of preferences, and `renyi.objectives.reward`, the
rewards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from renyi.evaluation import bootstrap, metrics
from renyi.evaluation.bootstrap import RESAMPLES, Estimate, intervals
from renyi.evaluation.metrics import Array


class RewardQuality(NamedTuple):
    """What `evaluate_rewards` finds.

    Attributes:
        accuracy: share of pairs whose better answer gets the greater reward, by the name of the reward: `mean` over
            members, `lcb` (mean − width · std), `worst` (the least of the members' rewards). Equal rewards count half.
        lcb_gain: accuracy of `lcb` minus that of `mean`.
        lcb_width: standard deviations that `lcb` is below the mean.
        spread: mean standard deviation of the members' rewards of an answer.
        margin_spread: mean standard deviation of the members' margins of a pair.
        finds_wrong: AUROC for the pairs that the mean orders wrongly, by what ranks them: `margin_spread`, `epistemic`
            uncertainty, `total` uncertainty, and `small_margin`, minus the size of the mean margin.
        finds_split: the same for pairs on which annotators split; None without votes, or if none or all are split.
        spread_and_epistemic: rank correlation (Spearman) of the spread of a pair's margins and its epistemic
            uncertainty. They differ where members agree on who wins and not on by how much.
    """

    accuracy: dict[str, Estimate]
    lcb_gain: Estimate
    lcb_width: float
    spread: float
    margin_spread: float
    finds_wrong: dict[str, float]
    finds_split: dict[str, float] | None
    spread_and_epistemic: float


def evaluate_rewards(
    better: Sequence[Sequence[float]],
    worse: Sequence[Sequence[float]],
    weights: Sequence[float],
    epistemic: Sequence[float],
    total: Sequence[float],
    is_split: Sequence[bool] | None = None,
    lcb_width: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RewardQuality:
    """Evaluate centred rewards of N pairs under M members, in float64.

    Args:
        better, worse: the members' rewards of the answer that is preferred and of the other one, [N][M].
        weights: mixture weights [M].
        epistemic, total: uncertainty of each pair's preference, nats, [N].
        is_split: on which pairs annotators split, [N].
        lcb_width: k of mean − k · std.
        resamples: draws for the intervals.
        seed: of the draws.
    """
    w_M = np.asarray(weights, np.float64) / np.sum(weights)
    sides = [np.asarray(side, np.float64) for side in (better, worse)]
    mean, std = ([side @ w_M for side in sides], [_spread(side, w_M) for side in sides])
    rewards = {
        "mean": mean,
        "lcb": [m - lcb_width * s for m, s in zip(mean, std, strict=True)],
        "worst": [side[:, w_M > 0].min(axis=1) for side in sides],
    }
    right = {name: (np.sign(a - b) + 1) / 2 for name, (a, b) in rewards.items()}
    figures = {**right, "gain": right["lcb"] - right["mean"]}
    found = intervals(
        {name: float(x.mean()) for name, x in figures.items()},
        {name: bootstrap.mean(x) for name, x in figures.items()},
        len(epistemic),
        resamples,
        seed,
    )
    margin_spread = _spread(sides[0] - sides[1], w_M)
    ranked = {
        "margin_spread": margin_spread,
        "epistemic": np.asarray(epistemic, np.float64),
        "total": np.asarray(total, np.float64),
        "small_margin": -np.abs(mean[0] - mean[1]),
    }
    wrong = mean[0] < mean[1]
    is_some = is_split is not None and 0 < sum(is_split) < len(is_split)
    correlates = len(epistemic) > 1 and np.ptp(margin_spread) > 0 and np.ptp(ranked["epistemic"]) > 0
    return RewardQuality(
        accuracy={name: found[name] for name in rewards},
        lcb_gain=found["gain"],
        lcb_width=lcb_width,
        spread=float(np.mean(std)),
        margin_spread=float(margin_spread.mean()),
        finds_wrong={name: metrics.auroc(x, wrong) for name, x in ranked.items()},
        finds_split={name: metrics.auroc(x, np.asarray(is_split)) for name, x in ranked.items()} if is_some else None,
        spread_and_epistemic=float(spearmanr(margin_spread, ranked["epistemic"]).statistic) if correlates else np.nan,
    )


def _spread(values: Array, weights: Array) -> Array:
    """The weighted standard deviation over members: [N] from [N, M]."""
    return np.sqrt((values - (values @ weights)[:, None]) ** 2 @ weights)
