"""PowerFlow's loss: what a policy pays for one trajectory of its own on the way to a power of its base.

From "PowerFlow" (Chen, Chen, Li and Huang 2026, arXiv 2603.18363), a length-aware form of trajectory balance (Malkin et
al. 2022, arXiv 2201.13259). For a trajectory y of n tokens, a base p and a policy π

    residual = log Z' + log π(y)/n − power · (log p(y)/n + ψ(y))                      `trajectory_residual`
    loss     = w · residual²                                                          `trajectory_balance`

where ψ is a format penalty in nats a token and w an `importance_weight`. Z' is learned, or the mean of a group of
trajectories of one prompt (`group_partition`); with this mean, the gradient on policy is twice GRPO's for the rewards
power · (log p/n + ψ) − log π/n.

The residual is 0 for every y if and only if

    log π*(y) = power · (log p(y) + n ψ(y)) − λ n,    log Z' = λ                       `power_target`

with λ the one number for which Σ_y π*(y) = 1. So the target is not p^power made to sum to one: λ is charged for every
token and moves mass between lengths. It is convex in the power; where ψ = 0 it is 0 at power 1, and below 0 above. The
entropy of sequences may rise with the power; divided by their mean length it is λ − power · dλ/dpower, and never rises.
The target's next tokens follow by backward recursion (`power_next_token`).

A loss of 0 on the policy's own trajectories does not prove that it is at the target: one that has collapsed on a few
sequences has it, too, with another Z'.

Two other balances, for comparison: "trajectory" is plain trajectory balance, of which the target is p^power made to sum
to one; "token_mean" takes the base's log-likelihood by token and the policy's by sequence, which favours what is long
and repeats itself (figure 3 of the paper).

Nothing here knows of models, prompts, rollouts or how Z' is learned.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BALANCES = ("length_aware", "trajectory", "token_mean")


class ImportanceWeight(NamedTuple):
    """What `importance_weight` returns, both of the shape of its arguments."""

    weight: Tensor
    is_clipped: Tensor


class PowerTarget(NamedTuple):
    """What `power_target` returns: log Z [...] and log π* [..., S], float64, in nats."""

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
    """By how much a trajectory is out of balance, in nats; a token for "length_aware", else a sequence.

    - length_aware: log Z' + log π/n − power · (log p/n + ψ)
    - trajectory: log Z + log π − power · (log p + n ψ)
    - token_mean: log Z + log π − power · (log p/n + ψ)

    Args:
        log_policy: log π(y) in nats, summed over the trajectory's tokens, [..., B]. Half precision is raised to
            float32, but was too coarse to sum in.
        log_base: log p(y), alike; [B] serves every member of a [M, B] policy. −inf is impossible at every power, 0
            included: the residual is inf.
        tokens: n, at least 1, [B]; with the end of text wherever the log-likelihoods have it.
        log_partition: log Z' (log Z), of a shape that broadcasts.
        power: the exponent, at least 0. 1 is the base itself; above 1 sharpens, below 1 flattens.
        penalty: ψ in nats a token, [B]; None is 0. −inf rules a trajectory out, as of `log_base`.
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
        weight: [..., B], as of `importance_weight`; None is 1.

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
    """The log Z' at which the residuals of a group have mean 0: a residual is then what it deviates from its group.

    At the target it is λ in every group. Deviations sum to zero, so without importance weights the gradient would be
    the same were it not detached.

    Args:
        group_size: how many consecutive trajectories (of the last dimension) answer one prompt, at least 2: one alone
            is its own mean, and nothing is learned.

    Other arguments are those of `trajectory_residual`.

    Returns:
        [..., B], detached; the same for every trajectory of a group.

    Raises:
        ValueError: as `trajectory_residual`; or groups of that size do not fill the last dimension.
    """
    with torch.no_grad():
        residual = trajectory_residual(log_policy, log_base, tokens, 0.0, power, penalty, balance)
        B = residual.shape[-1]
        if group_size < 2 or B % group_size:
            raise ValueError(
                f"{B} trajectories are no whole number of groups of group_size {group_size}; "
                "it should be at least 2 and divide their number."
            )
        mean = residual.unflatten(-1, (B // group_size, group_size)).mean(-1)
        return -mean.repeat_interleave(group_size, dim=-1)


def importance_weight(log_policy: Tensor, log_behaviour: Tensor, low: float, high: float) -> ImportanceWeight:
    """π(y) / behaviour(y) of whole sequences, held between `low` and `high`; detached.

    Exactly 1 where both are equal, as they are on policy.

    Args:
        log_policy: log π(y) in nats, summed over the tokens, [..., B].
        log_behaviour: that of the policy that wrote y, of a shape that broadcasts.
        low, high: bounds of the ratio, 0 ≤ low ≤ 1 ≤ high.

    Raises:
        ValueError: the bounds do not hold 1 between them.
    """
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(f"an importance weight between {low} and {high}; it should be 0 <= low <= 1 <= high")
    with torch.no_grad():
        ratio = (_at_least_float32(log_policy) - _at_least_float32(log_behaviour)).exp()
        weight = ratio.clamp(low, high)  # a ratio that overflowed is inf, and has its bound, too
        return ImportanceWeight(weight, weight != ratio)


def power_target(
    log_base: Tensor, tokens: Tensor, power: float, penalty: Tensor | None = None, balance: str = "length_aware"
) -> PowerTarget:
    """The one distribution, and log Z, at which every residual is 0: in closed form, all sequences being known.

    - length_aware: log π* = power · (log p + n ψ) − λ n, and log Z' = λ
    - trajectory: log π* = power · (log p + n ψ) − log Z
    - token_mean: log π* = power · (log p/n + ψ) − log Z

    Args:
        log_base: log p in nats of every sequence S there is, [..., S], in any order. −inf is impossible, and stays
            so at every power: at power 0 the others alone share.
        tokens: n of each, at least 1, [..., S].
        power, penalty, balance: as of `trajectory_residual`.

    Raises:
        ValueError: as `trajectory_residual`; or a log-likelihood or penalty is NaN or inf, a sequence has no tokens, or
            no sequence is possible.
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

    with h = e^(power · n · ψ) at the end of a sequence of n tokens, and h = 1 at the beginning. This last is not
    computed but put: if `log_partition` is not λ, the probabilities of the first token do not sum to 1.

    Args:
        sequences: every sequence S there is, token ids ≥ 0 and then −1 as padding, [S, L]. None is another's beginning.
        token_log_base: log p(y_t | y_<t) in nats, [S, L]; anything at padding.
        power: the exponent, at least 0.
        log_partition: λ in nats a token.
        penalty: ψ of each sequence in nats a token, [S]; None is 0.

    Returns:
        [S, L], float64, nats; 0 at padding, −inf from an impossible token on.

    Raises:
        ValueError: the power is negative or not finite, or a sequence occurs twice.
    """
    # node_of[t] numbers the prefixes of t tokens: the tree's nodes at depth t, as each sequence passes them.
    node_of = [sequences.new_zeros(len(sequences))]
    for token in sequences.unbind(-1):
        node_of.append(torch.stack([node_of[-1], token]).unique(dim=1, return_inverse=True)[1])
    if len(node_of[-1].unique()) < len(sequences):
        raise ValueError("a sequence occurs twice; every one should be given once")

    real = sequences >= 0
    edge = torch.where(real, _powered(token_log_base.detach().double(), power) - log_partition, 0.0)
    log_h = edge.new_zeros(len(sequences))
    if penalty is not None:
        log_h = _powered(real.sum(-1) * penalty.double(), power)
    log_probs = torch.zeros_like(edge)
    for t in reversed(range(sequences.shape[-1])):
        parent, child = node_of[t], node_of[t + 1]
        through = edge[:, t] + log_h
        # As many sequences pass a child as lie below it, and each brings it into the sum.
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
    """power · log_prob. What is impossible stays so even at power 0, where 0 · −inf would be NaN."""
    if not 0.0 <= power < math.inf:
        raise ValueError(f"power is {power}; it should be 0 or more (1 is the base, above 1 sharpens) and finite")
    return torch.where(log_prob == -math.inf, log_prob, power * log_prob)


def _length_aware_partition(log_target: Tensor, n: Tensor) -> Tensor:
    """λ with f(λ) = log Σ_y exp(c_y − λ n_y) = 0, [...] from c [..., S], by Newton's method from 0.

    f is convex and falls by at least 1 for 1, so the root is unique. A tangent lies below f: the first step ends left
    of the root, and the next ones climb to it without passing it. By the same inequality each of them at least
    quarters f · |f'|, so that some 50 exhaust float64 whatever the lengths. In practice five to ten do.
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
    """log Σ exp over the values [S] of each group, whose numbers [S] are 0 to G − 1: [G]."""
    nothing = values.new_full((int(group.max()) + 1,), -math.inf)
    # A finite top keeps −inf − top at −inf in a group that has nothing else; otherwise it would be NaN.
    top = nothing.scatter_reduce(0, group, values, "amax").clamp(min=torch.finfo(values.dtype).min)
    return top + torch.zeros_like(top).index_add(0, group, (values - top[group]).exp()).log()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
