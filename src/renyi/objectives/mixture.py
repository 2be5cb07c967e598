"""The α-Rényi loss: the loss of an ensemble on one example, and the share of the example that each member learns from.

Source: "Soft Specialists" (Cordero-Encinar, Tyukin and Duncan 2026, arXiv 2605.27747). The loss of a distribution Q
over adapters θ on the example (x, y) is

    loss_α(Q) = −(1/α) log E_{θ~Q} p_θ(y|x)^α,    0 < α ≤ 1.

For M members with weights w_m and log-likelihoods ℓ_m this is

    loss_α = −(1/α) log Σ_m w_m exp(α ℓ_m)                            `renyi_loss`

    −∂loss_α/∂ℓ_m = r_m,   r = softmax over m of log w_m + α ℓ_m      `responsibilities`

So the members are coupled by one float for each member and example, and by nothing else. As α → 0 the loss becomes
−Σ_m w_m ℓ_m, and every member fits everything (classical variational Bayes). At α = 1 the loss becomes
−log Σ_m w_m exp ℓ_m, and only the mixture has to fit. The loss never increases with α. The difference between its
values at α = 0 and at α = 1 is the `jensen_gap`.

A trap for readers of other papers: the order a of Rényi variational inference (Li and Turner 2016; also Pyro and
NumPyro) is a = 1 − α. The ELBO is a → 1 there and α → 0 here. Their expectation is over the whole data set. Ours is
over each example by itself.

ℓ need not be a likelihood. For any per-example loss c_m, take ℓ_m = −c_m (a Gibbs posterior).

Read next: `preference.py`, the loss of preference pairs, and `power.py`, the loss of PowerFlow.
"""

import torch
from torch import Tensor

# What responsibilities are computed from: the log-likelihood of a whole example, its mean per trained token, or that of
# each token by itself. With "token", what the functions below call an example is a token.
QUANTITIES = ("sequence", "length_normalised", "token")
CACHED = 2**17  # so many numbers and the copies made of them fit in the cache of a CPU


def renyi_loss(log_likelihood: Tensor, alpha: float | Tensor, log_weights: Tensor | None = None) -> Tensor:
    """−(1/α) log Σ_m w_m exp(α ℓ_m) of each example.

    The gradient with respect to ℓ is minus the `responsibilities`, which sum to one over members. Train on M times
    the loss, so that each member learns as fast as it would alone.

    In float32, for ℓ between −1e5 and 0, the relative error is below 1e-6 at every α, including α = 0.

    Args:
        log_likelihood: ℓ in nats, shape [M, ...], members first. Half precision is converted to float32. −inf (an
            impossible example) is meaningful for α > 0 only.
        alpha: the Rényi order, from 0 to 1. Give a 0-d tensor instead of a float if a schedule changes α, so that a
            compiled step is not compiled again. Autograd treats α as a constant. The range of a tensor is not checked.
        log_weights: log w up to a constant, shape [M], or [M, ...] if each example has its own; None is uniform.
            −inf drops a member. The ℓ of a dropped member may be anything.

    Returns:
        The loss in nats, shape [...]; inf for an example that is impossible under every member.

    Raises:
        ValueError: alpha is a float outside [0, 1], or log_weights does not match the members.
    """
    centre, deviation, log_weights = _centred(log_likelihood, log_weights)
    return -(centre + _exponential_mean(deviation, alpha, log_weights))


def responsibilities(log_likelihood: Tensor, alpha: float | Tensor, log_weights: Tensor | None = None) -> Tensor:
    """softmax over members of log w_m + α ℓ_m: the share of each example that each member learns from.

    At α = 0 these are the weights. At α = 1 they are the posterior over members given the example. The shape is
    [M, ...], and the sum over members is one. Arguments and errors are those of `renyi_loss`.
    """
    _, deviation, log_weights = _centred(log_likelihood, log_weights)
    return (log_weights + _order(alpha, deviation.dtype) * deviation).softmax(0)


def example_loss(
    log_likelihood: Tensor,
    tokens: Tensor,
    alpha: float | Tensor,
    log_weights: Tensor | None = None,
    quantity: str = "sequence",
) -> Tensor:
    """The α-Rényi loss of examples whose responsibilities follow from ℓ, or from the mean of ℓ per token.

    With "length_normalised", the loss of an example of T tokens is T times the α-Rényi loss of ℓ/T. So at every α the
    gradient with respect to ℓ is minus the `example_responsibilities`. At α = 0 both quantities give the same loss.

    Args:
        log_likelihood: ℓ [M, ...] in nats, summed over trained tokens.
        tokens: number of trained tokens [...]; an example without any counts as one token.
        alpha: the Rényi order.
        log_weights: log w, as for `renyi_loss`.
        quantity: one of `QUANTITIES`.

    Returns:
        The loss in nats, shape [...].
    """
    units = routed_units(tokens, quantity)
    return units * renyi_loss(log_likelihood / units, alpha, log_weights)


def example_responsibilities(
    log_likelihood: Tensor,
    tokens: Tensor,
    alpha: float | Tensor,
    log_weights: Tensor | None = None,
    quantity: str = "sequence",
) -> Tensor:
    """The share [M, ...] of each example that each member learns from under `example_loss`. The arguments are its."""
    return responsibilities(log_likelihood / routed_units(tokens, quantity), alpha, log_weights)


def group_sums(log_likelihood: Tensor, group: Tensor, num_groups: int | None = None) -> Tensor:
    """ℓ of groups of examples: the sums [M, G] of ℓ [M, E] over the examples of each group.

    The examples of a group share one responsibility: that of the group as a whole, `responsibilities` of these sums.
    The loss of a group is `renyi_loss` of its sum. If only some examples of a group are at hand, let S [M, G] be the ℓ
    of the others, and take log w + α S for `log_weights`, normalised over members. That loss is the group's whole loss
    less the loss of the others, and its responsibilities are those of the whole group.

    Args:
        log_likelihood: ℓ [M, E].
        group: the group of each example, numbered from 0, [E].
        num_groups: G; by default one more than the greatest number.
    """
    many = int(group.max()) + 1 if num_groups is None else num_groups
    return log_likelihood.new_zeros(len(log_likelihood), many).index_add(1, group, log_likelihood)


def routed_units(tokens: Tensor, quantity: str) -> Tensor:
    """The divisor of an example's ℓ before responsibilities are computed: 1, or its trained `tokens`. Shape [...]."""
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; it should be one of {QUANTITIES}")
    return tokens.clamp(min=1) if quantity == "length_normalised" else torch.ones_like(tokens)


def running_log_weights(log_weights: Tensor, log_prob: Tensor) -> Tensor:
    """Bayes' rule for one more token: log w_m + log p_m(y_t), normalised over members.

    After a prefix, members that explained it well count more. A logits processor may force a token that every member
    with a weight above 0 rules out. The evidence is then 0, and 0/0 would be NaN. There the weights do not change.

    Args:
        log_weights: log w before the token, normalised, [M, ...].
        log_prob: log p_m(y_t | x, y_<t) in nats, [M, ...].

    Returns:
        log w after the token, normalised, [M, ...].
    """
    joint = log_weights + log_prob
    evidence = joint.logsumexp(0)
    return torch.where(evidence > -torch.inf, joint - evidence, log_weights)


def mixture_log_probs(log_probs: Tensor, log_weights: Tensor) -> Tensor:
    """log Σ_m w_m p_m of the mixture's next token, nats, float32: [..., V] from [M, ..., V].

    Args:
        log_probs: of every token under each member, nats, [M, ..., V].
        log_weights: of the members, normalised, [M, ...].
    """
    if len(log_probs) == 1:
        return log_probs[0]
    log_w = log_weights[..., None].float()
    # By parts that fit in the cache, so that no copy goes to main memory. The numbers are the same.
    return torch.cat([(log_w + part).logsumexp(0) for part in log_probs.split(columns_in_cache(log_probs), -1)], -1)


def columns_in_cache(values: Tensor) -> int:
    """How many columns of the last dimension fit in the cache of a CPU together, at least one; all on other devices."""
    columns = values.shape[-1]
    return columns if values.device.type != "cpu" else max(1, CACHED * columns // max(1, values.numel()))


def mixture_logits(logits: Tensor, log_probs: Tensor, log_weights: Tensor) -> Tensor:
    """`mixture_log_probs` plus the members' mean log-normaliser: [..., V], float32.

    What changes scores before a token is drawn expects logits: a repetition penalty depends on the sign of a logit.
    With the log-normaliser, members that agree exactly are penalised as each of them alone would be.

    Args:
        logits: of every token under each member, [M, ..., V].
        log_probs: their log-softmax, float32.
        log_weights: of the members, normalised, [M, ...].
    """
    if len(logits) == 1:
        return logits[0].to(torch.float32, copy=True)
    level = (logits.amax(-1).float() - log_probs.amax(-1))[..., None]
    return mixture_log_probs(log_probs, log_weights) + (log_weights[..., None].float().exp() * level).sum(0)


def jensen_gap(log_likelihood: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Mean member NLL − mixture NLL = loss_0 − loss_1: how much better the mixture explains data than a mean member.

    In nats, shape [...] from [M, ...]. It is never negative, and exactly 0 where the members agree exactly.
    Arguments and errors are those of `renyi_loss`.
    """
    _, deviation, log_weights = _centred(log_likelihood, log_weights)
    mixture = _exponential_mean(deviation, 1.0, log_weights)
    average_member = _exponential_mean(deviation, 0.0, log_weights)
    return (mixture - average_member).clamp(min=0.0)


def effective_members(responsibilities: Tensor) -> Tensor:
    """exp of the entropy over members, [...] from [M, ...]: 1 if one member takes all, M if all take equal shares."""
    r = _at_least_float32(responsibilities)
    # log 1 takes the place of log 0, so that neither 0 · log 0 nor its gradient is NaN.
    return (-r * torch.where(r > 0, r, 1.0).log()).sum(0).exp()


# The numerics. Computed directly, log Σ w exp(α ℓ) / α would lose every digit as α → 0.


def _centred(log_likelihood: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest ℓ [...], each member's deviation from it [M, ...], at most 0, and normalised log w [M, ...].

    The loss does not depend on the centre, so autograd treats the centre as a constant. A dropped member does not set
    the centre, and its deviation is 0. Otherwise its weight of 0 could be multiplied by an infinity, which is NaN.
    """
    log_likelihood = _at_least_float32(log_likelihood)
    if log_weights is None:
        log_weights = log_likelihood.new_zeros(log_likelihood.shape[0])
    given = log_weights.shape
    if len(given) == 0 or given != log_likelihood.shape[: len(given)]:
        raise ValueError(
            f"log_weights has shape {list(given)}, which does not match a log_likelihood of shape "
            f"{list(log_likelihood.shape)}; it should be [{log_likelihood.shape[0]}], one for each member."
        )
    log_weights = log_weights.to(log_likelihood.dtype).log_softmax(0)
    log_weights = log_weights.reshape(given + (1,) * (log_likelihood.dim() - len(given)))

    dropped = log_weights == -torch.inf
    centre = torch.where(dropped, -torch.inf, log_likelihood.detach()).amax(0)
    # The centre must be finite: where every member has −inf, −inf − (−inf) would be NaN.
    centre = centre.clamp(min=torch.finfo(centre.dtype).min)
    return centre, torch.where(dropped, 0.0, log_likelihood - centre), log_weights


def _exponential_mean(deviation: Tensor, alpha: float | Tensor, log_weights: Tensor) -> Tensor:
    """(1/α) log Σ_m w_m exp(α d_m), [...] from [M, ...], for deviations d ≤ 0 of which the greatest is 0.

    The sum is 1 + u, with u = Σ_m w_m (exp(α d_m) − 1) between −1 and 0. For u near 0, expm1 and log1p keep the digits
    that 1 + u would round away. For u near −1, 1 + u would cancel, and logsumexp keeps the digits.
    """
    order = _order(alpha, deviation.dtype)
    weights, exponent = log_weights.softmax(0), order * deviation
    u = (weights * exponent.expm1()).sum(0)
    small = u > -0.5
    # The inner `where` keeps the argument of log1p away from −1: the slope is infinite there, and 0 · inf is NaN.
    near = torch.where(small, u, 0.0).log1p()
    far = (log_weights + exponent).logsumexp(0)
    return torch.where(small, near, far) / order


def _order(alpha: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """α, or eps² if that is greater. At eps² the loss equals its limit at 0, so α = 0 needs no branch of its own.

    eps² is a power of two, so multiplying and dividing by it is exact. At α = 0 it does not change the result.
    """
    smallest = torch.finfo(dtype).eps ** 2
    if isinstance(alpha, Tensor):
        return alpha.detach().to(dtype).clamp(min=smallest)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it should be between 0 (each fits all) and 1 (the mixture fits)")
    return max(alpha, smallest)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
