"""The α-Rényi loss: what an ensemble pays for one example, and which member learns from it.

From "Soft Specialists" (Cordero-Encinar, Tyukin and Duncan 2026, arXiv 2605.27747). A distribution Q over
adapters θ pays for the example (x, y)

    loss_α(Q) = −(1/α) log E_{θ~Q} p_θ(y|x)^α,    0 < α ≤ 1.

For M members with weights w_m and log-likelihoods ℓ_m this is

    loss_α = −(1/α) log Σ_m w_m exp(α ℓ_m)                            `renyi_loss`

    −∂loss_α/∂ℓ_m = r_m,   r = softmax over m of log w_m + α ℓ_m      `responsibilities`

so members are coupled through one float per member and example, and through nothing else. As α → 0 the loss
becomes −Σ_m w_m ℓ_m, and every member fits everything (classical variational Bayes). At α = 1 it becomes
−log Σ_m w_m exp ℓ_m, and only the mixture has to fit. It never increases with α, and how far it falls between
those two ends is the `jensen_gap`.

Convention trap: the order a of Rényi variational inference (Li and Turner 2016, whom Pyro and NumPyro follow)
is a = 1 − α. Their a → 1 is the ELBO, our α → 0. Theirs also takes one expectation over the whole data set,
ours one for each example.

ℓ need not be a likelihood: with any per-example loss c_m, take ℓ_m = −c_m (a Gibbs posterior). The loss of preference
pairs is in `preference.py`, that of PowerFlow in `power.py`.
"""

import torch
from torch import Tensor

# What is routed: the log-likelihood of a whole example, or its mean per trained token.
QUANTITIES = ("sequence", "length_normalised")


def renyi_loss(log_likelihood: Tensor, alpha: float | Tensor, log_weights: Tensor | None = None) -> Tensor:
    """−(1/α) log Σ_m w_m exp(α ℓ_m), one for each example.

    Its gradient with respect to ℓ is minus the `responsibilities`, which sum to one over members. Train on M
    times the loss for each member to learn as fast as it would alone.

    In float32, for ℓ between −1e5 and 0, the relative error is below 1e-6 at every α, 0 included.

    Args:
        log_likelihood: ℓ in nats, shape [M, ...], members first. Half precision is raised to float32. −inf
            (an impossible example) has its meaning for α > 0 only.
        alpha: the Rényi order, from 0 to 1. A float, or a 0-d tensor so that a compiled step is not compiled
            again whenever a schedule moves it. A constant to autograd; a tensor's range is not checked.
        log_weights: log w up to a constant, shape [M], or [M, ...] where each example has its own; None is
            uniform. −inf drops a member, whose ℓ may then be anything at all.

    Returns:
        The loss in nats, shape [...]; inf for an example that is impossible for every member.

    Raises:
        ValueError: alpha is a float outside [0, 1], or log_weights does not match the members.
    """
    centre, deviation, log_weights = _centred(log_likelihood, log_weights)
    return -(centre + _exponential_mean(deviation, alpha, log_weights))


def responsibilities(log_likelihood: Tensor, alpha: float | Tensor, log_weights: Tensor | None = None) -> Tensor:
    """softmax over members of log w_m + α ℓ_m: the share of each example that each member learns from.

    At α = 0 these are the weights, at α = 1 the posterior over members given the example. Shape [M, ...], one
    in sum over members. Arguments and errors are those of `renyi_loss`.
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
    """The α-Rényi loss of examples that are routed by their log-likelihood, or by its mean per token.

    With "length_normalised" routing an example of T tokens pays T times the loss of ℓ/T. So at every α the gradient by
    ℓ is minus its `example_responsibilities`, and at α = 0 both quantities give the same loss.

    Args:
        log_likelihood: ℓ [M, ...] in nats, summed over trained tokens.
        tokens: trained tokens [...]; an example of none counts as one of one token.
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
    """The share [M, ...] of each example that each member learns from under `example_loss`; arguments as there."""
    return responsibilities(log_likelihood / routed_units(tokens, quantity), alpha, log_weights)


def routed_units(tokens: Tensor, quantity: str) -> Tensor:
    """What the log-likelihood of an example is divided by before it is routed, in the shape of its trained `tokens`."""
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; it should be one of {QUANTITIES}")
    return tokens.clamp(min=1) if quantity == "length_normalised" else torch.ones_like(tokens)


def running_log_weights(log_weights: Tensor, log_prob: Tensor) -> Tensor:
    """Bayes' rule for one more token: log w_m + log p_m(y_t), normalised over members.

    After a prefix, members that explained it count more. Weights stay as they are where no member of weight above 0
    allows the token, which a logits processor may force: the evidence is 0 there, and 0/0 would be NaN.

    Args:
        log_weights: log w before the token, normalised, [M, ...].
        log_prob: log p_m(y_t | x, y_<t) in nats, [M, ...].

    Returns:
        log w after the token, normalised, [M, ...].
    """
    joint = log_weights + log_prob
    evidence = joint.logsumexp(0)
    return torch.where(evidence > -torch.inf, joint - evidence, log_weights)


def jensen_gap(log_likelihood: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Mean member NLL − mixture NLL = loss_0 − loss_1: what the members know apart that none knows alone.

    In nats, shape [...] from [M, ...]. Never negative, and exactly 0 where the members agree exactly.
    Arguments and errors are those of `renyi_loss`.
    """
    _, deviation, log_weights = _centred(log_likelihood, log_weights)
    mixture = _exponential_mean(deviation, 1.0, log_weights)
    average_member = _exponential_mean(deviation, 0.0, log_weights)
    return (mixture - average_member).clamp(min=0.0)


def effective_members(responsibilities: Tensor) -> Tensor:
    """exp of the entropy over members, [...] from [M, ...]: 1 where one takes all, M where all share."""
    r = _at_least_float32(responsibilities)
    # log 1 stands in for log 0, so that neither 0 · log 0 nor its gradient is NaN.
    return (-r * torch.where(r > 0, r, 1.0).log()).sum(0).exp()


# The numerics. As it stands, log Σ w exp(α ℓ) / α would lose every digit as α → 0.


def _centred(log_likelihood: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The best ℓ [...], each member's deviation from it [M, ...], at most 0, and normalised log w [M, ...].

    The loss is the same wherever it is centred, so the centre is a constant to autograd. A dropped member
    neither sets the centre nor deviates from it, lest its weight of 0 meet an infinity: 0 · inf is NaN.
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
    # A finite centre keeps −inf − centre at −inf where every member has −inf; otherwise it would be NaN.
    centre = centre.clamp(min=torch.finfo(centre.dtype).min)
    return centre, torch.where(dropped, 0.0, log_likelihood - centre), log_weights


def _exponential_mean(deviation: Tensor, alpha: float | Tensor, log_weights: Tensor) -> Tensor:
    """(1/α) log Σ_m w_m exp(α d_m), [...] from [M, ...], for deviations d ≤ 0 that reach 0.

    The sum is 1 + u, with u = Σ_m w_m (exp(α d_m) − 1) between −1 and 0. For small u, expm1 and log1p keep
    what 1 + u would round away; towards −1 it is 1 + u that cancels, and logsumexp keeps its digits.
    """
    order = _order(alpha, deviation.dtype)
    weights, exponent = log_weights.softmax(0), order * deviation
    u = (weights * exponent.expm1()).sum(0)
    small = u > -0.5
    # The inner where keeps log1p off −1, where its slope is infinite and 0 · inf would be the gradient.
    near = torch.where(small, u, 0.0).log1p()
    far = (log_weights + exponent).logsumexp(0)
    return torch.where(small, near, far) / order


def _order(alpha: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """α, or eps² if that is greater: so near 0 the loss is its own limit, and 0 needs no branch.

    eps² is a power of two, by which floats multiply and divide exactly: at α = 0 the scale leaves no trace.
    """
    smallest = torch.finfo(dtype).eps ** 2
    if isinstance(alpha, Tensor):
        return alpha.detach().to(dtype).clamp(min=smallest)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it should be between 0 (each fits all) and 1 (the mixture fits)")
    return max(alpha, smallest)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
