"""Splits the uncertainty of a token into the members' own uncertainty and their disagreement.

The input is the members' log-probabilities and their weights. Read next: `objectives/mixture.py`, whose
`running_log_weights` updates the weights after each token, and `ensemble/decode.py`, which calls both.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from renyi.objectives.mixture import CACHED, columns_in_cache, effective_members, responsibilities

_IMPOSSIBLE = -1e30  # takes the place of log 0: its exp is 0, and 0 times it is not NaN


class TokenUncertainty(NamedTuple):
    """What `token_uncertainty` returns: float64, shape [...]. All are in nats except `variation_ratio`."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    expected_pairwise_kl: Tensor
    reverse_mi: Tensor
    variation_ratio: Tensor


def token_uncertainty(log_probs: Tensor, log_weights: Tensor | None = None) -> TokenUncertainty:
    """Split the uncertainty of the mixture p̄ = Σ_m w_m p_m over the next token into aleatoric and epistemic parts.

    - total: H[p̄], which is aleatoric + epistemic.
    - aleatoric: Σ_m w_m H[p_m], the mean uncertainty of a member by itself.
    - epistemic: Σ_m w_m KL(p_m ‖ p̄), the mutual information of member and token. It is exactly 0 where the members
      agree exactly. It is at most the entropy of w (log M if uniform); this value is reached where no token has a
      positive probability under two members.
    - reverse_mi: Σ_m w_m KL(p̄ ‖ p_m).
    - expected_pairwise_kl: Σ_mn w_m w_n KL(p_m ‖ p_n), which is −Σ_v p̄ (Σ_m w_m log p_m) − aleatoric, and
      epistemic + reverse_mi.
    - variation_ratio: each member votes for its most likely token; this is 1 − the greatest total weight of one token.

    Probabilities are averaged, never logits. The arithmetic is float64. Definitions: Malinin and Gales 2021,
    "Uncertainty estimation in autoregressive structured prediction" (arXiv 2002.07650).

    Args:
        log_probs: log p_m in nats, shape [M, ..., V], each row normalised over the vocabulary. −inf is a probability
            of 0. Where one member gives 0 to a token and another does not, reverse_mi and expected_pairwise_kl are
            inf. Nothing is NaN.
        log_weights: log w up to a constant, shape [M], or [M, ...] if each position has its own; None is uniform. A
            member with −inf does not count.

    Raises:
        ValueError: log_weights does not match the members.
    """
    w = responsibilities(log_probs.new_zeros(log_probs.shape[:-1], dtype=torch.float64), 1.0, log_weights)  # [M, ...]
    if log_probs.device.type == "cpu" and log_probs.dim() > 2 and log_probs.numel() > CACHED:
        many = CACHED * log_probs.shape[1] // log_probs.numel()  # positions whose numbers fit in the cache together
        parts = (x.split(many, 1) if many > 1 else x.unbind(1) for x in (log_probs, w))
        each = [token_uncertainty(p, v.log()) for p, v in zip(*parts, strict=True)]
        joined = torch.cat if many > 1 else torch.stack
        return TokenUncertainty(*(joined(values) for values in zip(*each, strict=True)))
    columns = columns_in_cache(log_probs)
    sums = torch.stack([_sums_of_tokens(part, w) for part in log_probs.split(columns, -1)]).sum(0)
    total, aleatoric, epistemic, reverse_mi = sums[0], sums[1], sums[2].clamp(min=0.0), sums[3].clamp(min=0.0)
    ratio = _variation_ratio(log_probs.argmax(-1), w)
    return TokenUncertainty(total, aleatoric, epistemic, epistemic + reverse_mi, reverse_mi, ratio)


def _sums_of_tokens(log_probs: Tensor, w: Tensor) -> Tensor:
    """`token_uncertainty`'s total, aleatoric, epistemic and reverse_mi over some of the tokens, stacked: [4, ...].

    A KL summed over some tokens only may be negative.
    """
    # The heaviest member takes the place of members of weight 0, because 0 times an infinity would be NaN.
    heaviest = w.argmax(0)[None, ..., None].expand_as(log_probs[:1])
    heard = torch.where(w[..., None] > 0, log_probs, log_probs.gather(0, heaviest))
    lowest, highest = heard.amin(0), heard.amax(0)
    log_p = heard.clamp(min=_IMPOSSIBLE).double()

    # exp takes most of the time, so it is computed once. Sums over members are matrix products.
    p = log_p.exp()
    mixture = _over_members(w, p)
    log_mixture = torch.where(lowest == highest, log_p[0], mixture.log()).clamp(min=_IMPOSSIBLE)
    # Both KLs are summed term by term. So they are exactly 0 where the members agree; differences of entropies are not.
    excess = log_p - log_mixture
    is_ruled_out = ((lowest == -torch.inf) & (mixture > 0)).any(-1)
    return torch.stack(
        [
            vecdot(mixture, -log_mixture),
            0.0 - (w * vecdot(p, log_p)).sum(0),  # 0 − 0 is 0, and −0 is not
            (w * vecdot(p, excess)).sum(0),
            vecdot(mixture, -_over_members(w, excess)).masked_fill(is_ruled_out, torch.inf),
        ]
    )


class DrawUncertainty(NamedTuple):
    """What `draw_uncertainty` returns: float64, nats, shape [...]."""

    within_members: Tensor
    between_members: Tensor


def draw_uncertainty(log_probs: Tensor, log_weights: Tensor | None = None, num_draws: int = 1) -> DrawUncertainty:
    """Split the epistemic uncertainty of `token_uncertainty` where members are distributions and rows their draws.

    A member's p_m is the mixture of its draws p_ms, with weights w_ms that sum to w_m.

    - within_members: Σ_ms w_ms KL(p_ms ‖ p_m), the mutual information of draw and token inside a member, averaged over
      members. It is what a member does not know by itself. It is 0 without draws.
    - between_members: Σ_m w_m KL(p_m ‖ p̄), what the members disagree about.

    They sum to epistemic. So the total uncertainty is aleatoric + within + between.

    Args:
        log_probs: log p_ms in nats, [M·S, ..., V], the S draws of a member one after another.
        log_weights: log w up to a constant, [M·S] or [M·S, ...]; None is uniform.
        num_draws: S.

    Raises:
        ValueError: log_weights does not match, or S does not divide the number of rows.
    """
    if num_draws < 1 or len(log_probs) % num_draws:
        raise ValueError(f"{len(log_probs)} rows are not {num_draws} draws of each member")
    epistemic = token_uncertainty(log_probs, log_weights).epistemic
    if num_draws == 1:
        return DrawUncertainty(torch.zeros_like(epistemic), epistemic)
    w = responsibilities(log_probs.new_zeros(log_probs.shape[:-1], dtype=torch.float64), 1.0, log_weights)
    within = torch.zeros_like(epistemic)
    for log_p_S, w_S in zip(log_probs.split(num_draws), w.split(num_draws), strict=True):
        weight = w_S.sum(0)
        inside = torch.where(weight > 0, w_S, 1.0).log()  # the draws of a member that does not count may be anything
        within = within + weight * token_uncertainty(log_p_S, inside).epistemic
    within = torch.minimum(within, epistemic)
    return DrawUncertainty(within, epistemic - within)


def responsibility_entropy(log_likelihood: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Entropy of the posterior over members given each text, softmax over m of log w_m + ℓ_m.

    It is 0 if one member alone explains the text, and at most log M. It is the logarithm of `effective_members`.

    Args:
        log_likelihood: ℓ in nats, shape [M, ...].
        log_weights: log w up to a constant, shape [M] or [M, ...]; None is uniform.

    Returns:
        float64, nats, shape [...].
    """
    return effective_members(responsibilities(log_likelihood.double(), 1.0, log_weights)).log().clamp(min=0.0)


def log_likelihood_spread(
    log_likelihood: Tensor, tokens: Tensor | int = 1, log_weights: Tensor | None = None
) -> Tensor:
    """Standard deviation over members of ℓ per token: float64, nats per token, shape [...] from ℓ [M, ...].

    Exactly 0 where the members agree exactly.

    Args:
        log_likelihood: ℓ in nats, shape [M, ...].
        tokens: how many tokens ℓ sums over, shape [...].
        log_weights: log w up to a constant, shape [M] or [M, ...]; None is uniform.
    """
    ell = log_likelihood.double()
    if log_weights is None:
        log_weights = ell.new_zeros(ell.shape[0])
    w = log_weights.double().softmax(0)
    w = w.reshape(w.shape + (1,) * (ell.dim() - w.dim()))
    # Subtract a member with a weight first: equal likelihoods then deviate by exactly 0.
    deviation = ell - ell.gather(0, w.expand_as(ell).argmax(0, keepdim=True))
    deviation = deviation - _mean(deviation, w, 0)
    return _mean(deviation.square(), w, 0).sqrt() / tokens


def _mean(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Σ weights · values over `dim`. A value with a weight of 0 counts as 0, even if it is infinite or NaN."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum(dim)


def _over_members(w: Tensor, values: Tensor) -> Tensor:
    """Σ_m w_m values_m: [..., V] from [M, ...] and [M, ..., V]."""
    return (w.movedim(0, -1)[..., None, :] @ values.movedim(0, -2)).squeeze(-2)


def _variation_ratio(votes: Tensor, weights: Tensor) -> Tensor:
    """1 − the greatest total weight of members that vote for the same token, [...] from votes [M, ...]."""
    alike = votes.unsqueeze(0) == votes.unsqueeze(1)  # [M, M, ...]
    return (1.0 - (weights.unsqueeze(1) * alike).sum(0).amax(0)).clamp(min=0.0)
