"""PowerFlow's loss: it moves a policy toward a power of its base, by the policy's own trajectories.

Source: "PowerFlow" (Chen, Chen, Li and Huang 2026, arXiv 2603.18363). It is a length-aware form of trajectory balance
(Malkin et al. 2022, arXiv 2201.13259). For a trajectory y of n tokens, a base p and a policy π

    residual = log Z' + log π(y)/n − power · (log p(y)/n + ψ(y))                      `trajectory_residual`
    loss     = w · residual²                                                          `trajectory_balance`

ψ is a format penalty in nats per token, and w is an `importance_weight`. Z' is learned, or it is the mean over a group
of trajectories of one prompt (`group_partition`). With the group's mean, the on-policy gradient is twice the gradient
of GRPO with the rewards power · (log p/n + ψ) − log π/n.

The residual is 0 for every y if and only if

    log π*(y) = power · (log p(y) + n ψ(y)) − λ n,    log Z' = λ                       `power_target`

λ is the one number for which Σ_y π*(y) = 1. So the target is not p^power divided by its sum: λ applies to every token,
and so it moves probability between lengths. λ is convex in the power. If ψ = 0, then λ is 0 at power 1 and negative
above. The entropy of sequences may rise with the power. The entropy divided by the mean length is λ − power · dλ/dpower
and never rises. The target's next-token probabilities follow by backward recursion (`power_next_token`).

A loss of 0 on the policy's own trajectories does not prove that the policy is at the target. A policy that has
collapsed to a few sequences has a loss of 0 as well, with another Z'.

There are two other balances, for comparison:

- "trajectory" is plain trajectory balance. Its target is p^power divided by its sum.
- "token_mean" takes the base's log-likelihood per token and the policy's per sequence. It favours long texts that
  repeat themselves (figure 3 of the paper).

Read next: `training/powerflow.py`, the trainer, and `training/partition.py`, which learns Z'.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BALANCES = ("length_aware", "trajectory", "token_mean")


class ImportanceWeight(NamedTuple):
    """The result of `importance_weight`: weights, and whether each was clipped. Both have the arguments' shape."""

    weight: Tensor
    is_clipped: Tensor


class PowerTarget(NamedTuple):
    """The result of `power_target`: log Z [...] and log π* [..., S], float64, in nats."""

    log_partition: Tensor
    log_probs: Tensor


def trajectory_residual(
    log_policy: Tensor,
    log_base: Tensor,
    tokens: Tensor,
    log_partition: Tensor | float,
    power: float,
    penalty: Tensor | None = None,
    balance: str = "length_aware",
) -> Tensor:
    """How far a trajectory is from balance: in nats per token for "length_aware", else in nats per sequence.

    - length_aware: log Z' + log π/n − power · (log p/n + ψ)
    - trajectory: log Z + log π − power · (log p + n ψ)
    - token_mean: log Z + log π − power · (log p/n + ψ)

    Args:
        log_policy: log π(y) in nats, summed over the trajectory's tokens, [..., B]. Half precision is converted to
            float32, but a sum that was taken in half precision has already lost digits.
        log_base: log p(y) in nats, likewise; [B] serves every member of a policy [M, B]. −inf means impossible at
            every power, including 0: the residual is inf.
        tokens: n, at least 1, [B]. Count the end of text if the log-likelihoods include it.
        log_partition: log Z' (log Z), of a shape that broadcasts.
        power: the exponent, at least 0. 1 gives the base itself, above 1 sharpens, below 1 flattens.
        penalty: ψ in nats per token, [B]; None is 0. −inf excludes a trajectory, as in `log_base`.
        balance: one of `BALANCES`.

    Returns:
        [..., B]. Nothing is detached.

    Raises:
        ValueError: the power is negative or not finite, or the balance is unknown.
    """
    excess = log_policy - _log_target(log_base, tokens, power, penalty, balance)
    return log_partition + (excess / tokens if balance == "length_aware" else excess)


def trajectory_balance(
    log_policy: Tensor,
    log_base: Tensor,
    tokens: Tensor,
    log_partition: Tensor | float,
    power: float,
    penalty: Tensor | None = None,
    balance: str = "length_aware",
    weight: Tensor | None = None,
) -> Tensor:
    """weight · residual², the loss of each trajectory: [..., B].

    Args:
        weight: w, [..., B], from `importance_weight`; None is 1.

    Other arguments and errors are those of `trajectory_residual`.
    """
    loss = trajectory_residual(log_policy, log_base, tokens, log_partition, power, penalty, balance).square()
    return loss if weight is None else weight * loss


def group_partition(
    log_policy: Tensor,
    log_base: Tensor,
    tokens: Tensor,
    group_size: int,
    power: float,
    penalty: Tensor | None = None,
    balance: str = "length_aware",
) -> Tensor:
    """The log Z' for which the residuals of a group have mean 0.

    Each residual is then a deviation from the group's mean. At the target, log Z' is λ in every group. It is detached.
    Without importance weights that does not change the gradient, because the residuals of a group sum to zero.

    Args:
        group_size: how many consecutive trajectories (along the last dimension) answer one prompt, at least 2. A group
            of one always has the residual 0, so nothing would be learned.

    Other arguments are those of `trajectory_residual`.

    Returns:
        [..., B], detached; the same for every trajectory of a group.

    Raises:
        ValueError: as in `trajectory_residual`; or `group_size` does not divide the last dimension.
    """
    with torch.no_grad():
        residual = trajectory_residual(log_policy, log_base, tokens, 0.0, power, penalty, balance)
        B = residual.shape[-1]
        if group_size < 2 or B % group_size:
            raise ValueError(
                f"{B} trajectories do not divide into groups of group_size {group_size}; "
                "it should be at least 2 and divide their number."
            )
        mean = residual.unflatten(-1, (B // group_size, group_size)).mean(-1)
        return -mean.repeat_interleave(group_size, dim=-1)


def importance_weight(log_policy: Tensor, log_behaviour: Tensor, low: float, high: float) -> ImportanceWeight:
    """π(y) / behaviour(y) of whole sequences, clipped to the range from `low` to `high`; detached.

    Exactly 1 where both are equal, as they are on policy.

    Args:
        log_policy: log π(y) in nats, summed over the tokens, [..., B].
        log_behaviour: the same under the policy that wrote y, of a shape that broadcasts.
        low, high: bounds of the ratio, 0 ≤ low ≤ 1 ≤ high.

    Raises:
        ValueError: 1 is not between the bounds, or low is negative.
    """
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(f"an importance weight between {low} and {high}; it should be 0 <= low <= 1 <= high")
    with torch.no_grad():
        ratio = (_at_least_float32(log_policy) - _at_least_float32(log_behaviour)).exp()
        weight = ratio.clamp(low, high)  # a ratio that overflowed is inf, and is clipped as well
        return ImportanceWeight(weight, weight != ratio)


def power_target(
    log_base: Tensor, tokens: Tensor, power: float, penalty: Tensor | None = None, balance: str = "length_aware"
) -> PowerTarget:
    """The one distribution for which every residual is 0, and its log Z. All possible sequences must be given.

    - length_aware: log π* = power · (log p + n ψ) − λ n, and log Z' = λ
    - trajectory: log π* = power · (log p + n ψ) − log Z
    - token_mean: log π* = power · (log p/n + ψ) − log Z

    Args:
        log_base: log p in nats of each of the S possible sequences, [..., S], in any order. A sequence with −inf is
            impossible and stays so at every power, including 0.
        tokens: n of each sequence, at least 1, [..., S].
        power, penalty, balance: as in `trajectory_residual`.

    Raises:
        ValueError: as in `trajectory_residual`; or a log-likelihood or penalty is NaN or inf, a sequence has no tokens,
            or no sequence is possible.
    """
    n = tokens.double()
    log_target = _log_target(log_base.detach().double(), n, power, penalty, balance)
    if not (log_target < math.inf).all():
        raise ValueError("log_base and penalty should be numbers or −inf; at least one is NaN or inf")
    if not (n >= 1).all():
        raise ValueError("a sequence has fewer than 1 token; the end of text counts as one")
    if not (log_target > -math.inf).any(-1).all():
        raise ValueError("no sequence is possible: log_base is −inf for all")
    if balance == "length_aware":
        log_partition = _length_aware_partition(log_target, n)
        return PowerTarget(log_partition, log_target - log_partition.unsqueeze(-1) * n)
    log_partition = log_target.logsumexp(-1)
    return PowerTarget(log_partition, log_target - log_partition.unsqueeze(-1))


def power_next_token(
    sequences: Tensor,
    token_log_base: Tensor,
    power: float,
    log_partition: Tensor | float,
    penalty: Tensor | None = None,
) -> Tensor:
    """log π*(y_t | y_<t) of the length-aware target, by recursion from the ends of sequences to their beginning.

        π*(v | s) = p(v | s)^power e^−λ h(sv) / h(s),    h(s) = Σ_v p(v | s)^power e^−λ h(sv)

    with h = e^(power · n · ψ) at the end of a sequence of n tokens, and h = 1 at the beginning. The last value is set
    and not computed: if `log_partition` is not λ, the probabilities of the first token do not sum to 1.

    Args:
        sequences: all S possible sequences: token ids ≥ 0, then −1 as padding, [S, L]. No sequence may be the beginning
            of another one.
        token_log_base: log p(y_t | y_<t) in nats, [S, L]; any value at padding.
        power: the exponent, at least 0.
        log_partition: λ in nats per token.
        penalty: ψ of each sequence in nats per token, [S]; None is 0.

    Returns:
        [S, L], float64, nats: 0 at padding, and −inf from an impossible token onwards.

    Raises:
        ValueError: the power is negative or not finite, or a sequence occurs twice.
    """
    # Prefixes are the nodes of a tree. node_of[t] [S] is the number of each sequence's node at depth t.
    node_of = [sequences.new_zeros(len(sequences))]
    for token in sequences.unbind(-1):
        node_of.append(torch.stack([node_of[-1], token]).unique(dim=1, return_inverse=True)[1])
    if len(node_of[-1].unique()) < len(sequences):
        raise ValueError("a sequence occurs twice; give every sequence once")

    real = sequences >= 0
    edge = torch.where(real, _powered(token_log_base.detach().double(), power) - log_partition, 0.0)
    log_h = edge.new_zeros(len(sequences))
    if penalty is not None:
        log_h = _powered(real.sum(-1) * penalty.double(), power)
    log_probs = torch.zeros_like(edge)
    for t in reversed(range(sequences.shape[-1])):
        parent, child = node_of[t], node_of[t + 1]
        through = edge[:, t] + log_h
        # Every sequence below a child adds the child to the sum, so each adds it divided by their number.
        shared = through - child.bincount()[child].to(edge).log()
        log_h = _logsumexp_by(parent, shared)[parent] if t > 0 else torch.zeros_like(log_h)
        impossible = through == -math.inf
        log_probs[:, t] = torch.where(real[:, t], torch.where(impossible, through, through - log_h), 0.0)
    return log_probs


# The target without its normaliser, and the normaliser.


def _log_target(log_base: Tensor, tokens: Tensor, power: float, penalty: Tensor | None, balance: str) -> Tensor:
    """power · (log p + n ψ), or power · (log p/n + ψ) for "token_mean": [..., B], float32 or better."""
    if balance not in BALANCES:
        raise ValueError(f"unknown balance {balance!r}; one of {', '.join(BALANCES)}")
    reward = _at_least_float32(log_base)
    if balance == "token_mean":
        reward = reward / tokens
    if penalty is not None:
        reward = reward + (penalty if balance == "token_mean" else tokens * penalty)
    return _powered(reward, power)


def _powered(log_prob: Tensor, power: float) -> Tensor:
    """power · log_prob. −inf stays −inf even at power 0, where 0 · −inf would be NaN."""
    if not 0.0 <= power < math.inf:
        raise ValueError(f"power is {power}; it should be 0 or more (1 is the base, above 1 sharpens) and finite")
    return torch.where(log_prob == -math.inf, log_prob, power * log_prob)


def _length_aware_partition(log_target: Tensor, n: Tensor) -> Tensor:
    """λ with f(λ) = log Σ_y exp(c_y − λ n_y) = 0, [...] from c [..., S], by Newton's method from 0.

    f is convex, and its slope is −1 or steeper, so the root is unique. A tangent lies below f. So the first step ends
    at or left of the root, and the next steps move right to it without passing it. Each of these steps makes f · |f'|
    at most a quarter of what it was. So about 50 steps exhaust float64 for any lengths; in practice 5 to 10 are enough.
    """
    log_partition = log_target.new_zeros(log_target.shape[:-1])
    for _ in range(100):
        exponent = log_target - log_partition.unsqueeze(-1) * n
        mean_length = (exponent.softmax(-1) * n).sum(-1)
        step = exponent.logsumexp(-1) / mean_length
        log_partition = log_partition + step
        if (step.abs() <= 1e-15 * (1 + log_partition.abs())).all():
            break
    return log_partition


def _logsumexp_by(group: Tensor, values: Tensor) -> Tensor:
    """log Σ exp of the values [S] in each group, [G]. `group` [S] has the number of each value's group, 0 to G − 1."""
    nothing = values.new_full((int(group.max()) + 1,), -math.inf)
    # The top must be finite: in a group that holds only −inf, −inf − (−inf) would be NaN.
    top = nothing.scatter_reduce(0, group, values, "amax").clamp(min=torch.finfo(values.dtype).min)
    return top + torch.zeros_like(top).index_add(0, group, (values - top[group]).exp()).log()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
