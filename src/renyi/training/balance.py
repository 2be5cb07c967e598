"""What is watched of a trajectory balance, and whether a policy is where the balance says that it will be.

Every figure is a mean or follows from means of products, so that processes, micro-batches and log intervals add up.
At the fixed point log π = power · log p_base − λ |y|: the slopes of that regression must approach (power, −λ).
It knows log-likelihoods; nothing about prompts, models or trainers.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from renyi.training.routing import Sums


class Balance(NamedTuple):
    """A batch of B trajectories under M policies; nats.

    Attributes:
        log_policy: [M, B], summed over tokens; no gradient.
        log_base: [1 or M, B].
        tokens: [B].
        log_partition: [M, B].
        residual: [M, B].
        is_clipped: [M, B], whether the importance ratio was.
        entropy: [M, B], of the policy's next-token distributions, summed over tokens.
        weights: [M], of the policies.
    """

    log_policy: Tensor
    log_base: Tensor
    tokens: Tensor
    log_partition: Tensor
    residual: Tensor
    is_clipped: Tensor
    entropy: Tensor
    weights: Tensor


def balance_sums(batch: Balance) -> Sums:
    """What is added up of a batch; names that begin with "_" only serve what follows from them."""
    weights = batch.weights.double()[:, None]
    y, x, n = batch.log_policy.double(), batch.log_base.double(), batch.tokens.double()
    log_partition, residual = batch.log_partition.double(), batch.residual.double()

    def total(values: Tensor) -> Tensor:
        return (weights * values.expand_as(y)).sum()

    rows, tokens = y.new_tensor(len(n)), n.sum()
    return {
        "log_partition": (total(log_partition), rows),
        "_log_partition_squared": (total(log_partition.square()), rows),
        "residual/mean": (total(residual), rows),
        "_residual_squared": (total(residual.square()), rows),
        "logps/policy": (total(y), tokens),
        "logps/base": (total(x), tokens),
        "entropy": (total(batch.entropy.double()), tokens),
        "clip_fraction": (total(batch.is_clipped.double()), rows),
        **{
            f"_{name}": (total(value), rows)
            for name, value in (("xx", x * x), ("xn", x * n), ("nn", n * n), ("xy", x * y), ("ny", n * y))
        },
        "_yy": (total(y * y), rows),
        "_y": (total(y), rows),
    }


def balance_figures(means: dict[str, float]) -> dict[str, float]:
    """What is logged: the means, the spread of log Z', the residual's variance, and the regression.

    `slope/log_base` and `slope/length` are the least-squares coefficients, without intercept, of log π(y) on
    (log p_base(y), |y|), and `slope/r2` is the share of log π's variance that they explain. Where every trajectory has
    one length and one log-likelihood they are not determined, and the smallest are given.
    """
    m = means
    gram = np.array([[m["_xx"], m["_xn"]], [m["_xn"], m["_nn"]]])
    moments = np.array([m["_xy"], m["_ny"]])
    slopes = np.linalg.pinv(gram, hermitian=True, rcond=1e-9) @ moments
    left = m["_yy"] - 2 * slopes @ moments + slopes @ gram @ slopes
    spread = m["_yy"] - m["_y"] ** 2
    return {name: value for name, value in means.items() if not name.startswith("_")} | {
        "log_partition/std": _root(m["_log_partition_squared"] - m["log_partition"] ** 2),
        "residual/variance": max(0.0, m["_residual_squared"] - m["residual/mean"] ** 2),
        "slope/log_base": float(slopes[0]),
        "slope/length": float(slopes[1]),
        "slope/r2": float(1 - left / spread) if spread > 0 else float("nan"),
    }


def _root(variance: float) -> float:
    return float(np.sqrt(max(0.0, variance)))
