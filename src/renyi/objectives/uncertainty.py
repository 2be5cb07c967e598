"""How much of a token's uncertainty every member sees alike, and how much is the members' disagreement.

Knows log-probabilities and weights. It does not know what model gave them, or how weights follow a prefix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from renyi.objectives.mixture import effective_members, renyi_loss, responsibilities


class TokenUncertainty(NamedTuple):
    """What `token_uncertainty` returns: float64, shape [...], in nats but for the ratio."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    expected_pairwise_kl: Tensor
    reverse_mi: Tensor
    variation_ratio: Tensor


def token_uncertainty(log_probs: Tensor, log_weights: Tensor | None = None) -> TokenUncertainty:
    """Split the uncertainty of the mixture p̄ = Σ_m w_m p_m over the next token into doubt and disagreement.

    - total: H[p̄], which is aleatoric + epistemic.
    - aleatoric: Σ_m w_m H[p_m], the doubt that each member has by itself.
    - epistemic: Σ_m w_m KL(p_m ‖ p̄), the mutual information of member and token. Exactly 0 where the members
      agree exactly; at most the entropy of w (log M if uniform), where no two members share a token.
    - reverse_mi: Σ_m w_m KL(p̄ ‖ p_m).
    - expected_pairwise_kl: Σ_mn w_m w_n KL(p_m ‖ p_n), which is −Σ_v p̄ (Σ_m w_m log p_m) − aleatoric, and
      epistemic + reverse_mi.
    - variation_ratio: 1 − the greatest weight that votes for one token, each member voting for its likeliest.

    Probabilities are averaged, never logits; the arithmetic is float64. Definitions: Malinin and Gales 2021,
    "Uncertainty estimation in autoregressive structured prediction" (arXiv 2002.07650).

    Args:
        log_probs: log p_m in nats, shape [M, ..., V], each row normalised over the vocabulary. −inf is a
            probability of 0: where one member rules out what another allows, reverse_mi and
            expected_pairwise_kl are inf. Nothing is NaN.
        log_weights: log w up to a constant, shape [M], or [M, ...] where each position has its own; None is
            uniform. A member at −inf has no say.

    Raises:
        ValueError: log_weights does not match the members.
    """
    log_p = log_probs.double()
    if log_weights is None:
        log_weights = log_p.new_zeros(log_p.shape[0])
    log_weights = log_weights.double()
    log_mixture = -renyi_loss(log_p, 1.0, log_weights)  # at α = 1 the loss is the mixture's NLL

    every_position = log_weights.shape + (1,) * (log_p.dim() - 1 - log_weights.dim())
    w = log_weights.softmax(0).reshape(every_position)
    p, mixture = log_p.exp(), log_mixture.exp()
    excess = log_p - log_mixture

    # Summed term by term and not as differences of entropies, both KLs are exactly 0 where the members agree.
    epistemic = _mean(_mean(excess, p, -1), w, 0).clamp(min=0.0)
    reverse_mi = _mean(_mean(-excess, mixture, -1), w, 0).clamp(min=0.0)
    return TokenUncertainty(
        total=_mean(-log_mixture, mixture, -1),
        aleatoric=_mean(_mean(-log_p, p, -1), w, 0),
        epistemic=epistemic,
        expected_pairwise_kl=epistemic + reverse_mi,
        reverse_mi=reverse_mi,
        variation_ratio=_variation_ratio(log_p.argmax(-1), w),
    )


def responsibility_entropy(log_likelihood: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Entropy of the posterior over members given each text, softmax over m of log w_m + ℓ_m.

    0 where one member alone explains the text, at most log M; of `effective_members` it is the logarithm.

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
    """Standard deviation over members of ℓ per token: float64, nats a token, shape [...] from ℓ [M, ...].

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
    deviation = ell - ell[:1]  # from any one member: equal likelihoods then deviate by exactly 0
    deviation = deviation - _mean(deviation, w, 0)
    return _mean(deviation.square(), w, 0).sqrt() / tokens


def _mean(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Σ weights · values over `dim`. A weight of 0 silences its value, be it infinite or NaN."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum(dim)


def _variation_ratio(votes: Tensor, weights: Tensor) -> Tensor:
    """1 − the greatest weight of members with one vote, [...] from votes [M, ...]."""
    alike = votes.unsqueeze(0) == votes.unsqueeze(1)  # [M, M, ...]
    return (1.0 - (weights.unsqueeze(1) * alike).sum(0).amax(0)).clamp(min=0.0)
