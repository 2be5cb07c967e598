"""What is logged of a trajectory balance, and a check of whether a policy has reached the fixed point.

Every figure is a mean or follows from means of products, so that processes, micro-batches and log intervals add up.
At the fixed point log π = power · log p_base − λ |y| with a λ for each prompt: the slopes of that regression must
approach (power, −λ).
Read next: `renyi.objectives.power`, the loss itself.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from renyi.routing import Sums


class Balance(NamedTuple):
    """A batch of B trajectories under M policies; nats.

    Attributes:
        log_policy: [M, B], summed over tokens; no gradient.
        log_base: [1 or M, B].
        tokens: [B].
        log_partition: [M, B].
        residual: [M, B].
        is_clipped: [M, B], whether the importance ratio was clipped.
        entropy: [M, B], of the policy's next-token distributions, summed over tokens.
        weights: [M], of the policies.
        base_by_length: [1 or M, B], of the trajectory's prompt: the coefficient of log p_base on |y| (`by_length`).
        policy_by_length: [M, B], the same coefficient of log π.
    """

    log_policy: Tensor
    log_base: Tensor
    tokens: Tensor
    log_partition: Tensor
    residual: Tensor
    is_clipped: Tensor
    entropy: Tensor
    weights: Tensor
    base_by_length: Tensor
    policy_by_length: Tensor


def by_length(log_probs: Tensor, tokens: Tensor, group_size: int) -> Tensor:
    """Least-squares coefficient, without intercept, of log-likelihoods [..., N] on lengths [N] in each prompt's group.

    Returns:
        [..., N], the same for every trajectory of a group of `group_size` consecutive ones; nats a token.
    """
    n = tokens.to(log_probs).unflatten(-1, (-1, group_size))
    grouped = log_probs.unflatten(-1, (-1, group_size))
    return ((grouped * n).sum(dim=-1) / n.square().sum(dim=-1)).repeat_interleave(group_size, dim=-1)


def balance_sums(batch: Balance) -> Sums:
    """What is added up of a batch. Names that begin with "_" are not logged: other figures are computed from them."""
    weights = batch.weights.double()[:, None]
    y, x, n = batch.log_policy.double(), batch.log_base.double(), batch.tokens.double()
    log_partition, residual = batch.log_partition.double(), batch.residual.double()

    def total(values: Tensor) -> Tensor:
        return (weights * values.expand_as(y)).sum()

    rows, tokens = y.new_tensor(len(n)), n.sum()
    # What length does not explain within a prompt. This takes out λ, which differs between prompts.
    x_left, y_left = x - n * batch.base_by_length.double(), y - n * batch.policy_by_length.double()
    products = {"xx": x_left * x_left, "xy": x_left * y_left, "yy": y_left * y_left}
    products |= {"xn": x * n, "yn": y * n, "nn": n * n, "y": y, "y_squared": y * y}
    return {
        "log_partition": (total(log_partition), rows),
        "_log_partition_squared": (total(log_partition.square()), rows),
        "residual/mean": (total(residual), rows),
        "_residual_squared": (total(residual.square()), rows),
        "logps/policy": (total(y), tokens),
        "logps/base": (total(x), tokens),
        "entropy": (total(batch.entropy.double()), tokens),
        "clip_fraction": (total(batch.is_clipped.double()), rows),
        **{f"_{name}": (total(value), rows) for name, value in products.items()},
    }


def balance_figures(means: dict[str, float]) -> dict[str, float]:
    """What is logged: the means, the spread of log Z', the residual's variance, and the regression.

    `slope/log_base` and `slope/length` are the least-squares coefficients, without intercept, of log π(y) on
    (log p_base(y), |y|), the latter for each prompt by itself and averaged; `slope/r2` is the share of log π's variance
    that they explain. NaN where nothing varies.
    """
    m = means
    slope = m["_xy"] / m["_xx"] if m["_xx"] > 1e-12 * m["_y_squared"] else float("nan")
    left, spread = m["_yy"] - slope * m["_xy"], m["_y_squared"] - m["_y"] ** 2
    return {name: value for name, value in means.items() if not name.startswith("_")} | {
        "log_partition/std": _root(m["_log_partition_squared"] - m["log_partition"] ** 2),
        "residual/variance": max(0.0, m["_residual_squared"] - m["residual/mean"] ** 2),
        "slope/log_base": slope,
        "slope/length": (m["_yn"] - slope * m["_xn"]) / m["_nn"],
        "slope/r2": 1 - left / spread if spread > 1e-12 * m["_y_squared"] else float("nan"),
    }


def _root(variance: float) -> float:
    return float(np.sqrt(max(0.0, variance)))
