"""What a labelled pair is worth to a model: the log-likelihood of a preference, and other losses in its place.

A pair is a prompt x with a chosen completion y⁺ and a rejected one y⁻. A policy π and a reference π_ref give each
completion a log-ratio log π(y|x) − log π_ref(y|x), and the pair a margin (Rafailov et al. 2023, arXiv 2305.18290)

    Δ = β [log-ratio(y⁺) − log-ratio(y⁻)]                                         `preference_margin`

and the label the Bradley–Terry likelihood σ(Δ), so that an ensemble's members enter the α-Rényi loss by

    ℓ_m = log σ(Δ_m)                                                              `preference_log_likelihood`

Any other loss of a single pair enters as ℓ_m = −loss_m (a Gibbs posterior). Losses and options carry the names and
formulas of TRL's DPOTrainer, so that one member is that trainer. Losses that couple the pairs of a batch have no ℓ of
one pair and are refused.

One label is one bit. Where annotators contradict each other on a pair and on nothing else, a margin of 0 predicts them
as well as any mixture does, and for ℓ = log σ(Δ) members stay together at every α < 1. They part where one reward
cannot fit the pooled preferences: where these are not transitive, as with a matter of taste that some rank above all
else and others below.

Nothing here knows of models, tokens in context, or batches of text.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Why a loss of TRL's has no log-likelihood of a single pair.
COUPLED_LOSSES = {
    "aot": "it sorts the margins of a batch",
    "aot_unpaired": "it sorts the log-ratios of a batch",
    "sft": "it averages over the tokens of a batch",
}


@dataclass(frozen=True)
class PreferenceLoss:
    """The settings of a preference loss, under the names of TRL's DPOConfig.

    Attributes:
        beta: β, how dear it is to leave the reference; for "ipo" the paper's τ.
        loss_type: one or several of `PAIR_LOSSES`, which are then summed.
        loss_weights: of each; 1 if None.
        label_smoothing: share of flipped labels, for "robust" and "exo_pair".
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: of "alpha_divergence".
        discopop_tau: of "discopop".
        ld_alpha: weight of the tokens by which a completion is longer than the other; None is 1.
    """

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None


class LogRatios(NamedTuple):
    """Log-ratios of chosen and rejected completions to the reference, nats, and the completions' lengths in tokens.

    Ratios have any shape, members first; lengths are [B] and only needed by losses that normalise by them.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None


def preference_log_likelihood(ratios: LogRatios, loss: PreferenceLoss | None = None) -> Tensor:
    """ℓ of each pair under each member: log σ(Δ) for the "sigmoid" loss, −loss for any other.

    Args:
        ratios: [M, B] log-ratios; half precision is raised to float32.
        loss: which one; Bradley–Terry with β = 0.1 if None.

    Returns:
        [M, B], nats for "sigmoid".

    Raises:
        ValueError: a loss or divergence is unknown or couples the pairs of a batch, or lengths are missing.
    """
    loss = loss or PreferenceLoss()
    ratios = _in_float(ratios)
    weights = loss.loss_weights or (1.0,) * len(loss.loss_type)
    terms = [w * _pair_loss(name)(ratios, loss) for name, w in zip(loss.loss_type, weights, strict=True)]
    return -torch.stack(terms).sum(dim=0)


def preference_margin(ratios: LogRatios, loss: PreferenceLoss | None = None) -> Tensor:
    """Δ, so that σ(Δ) is the probability that the chosen completion is preferred.

    β times the difference of the completions' log-ratios; of f'(ratio) under another f-divergence, and of the mean per
    token for "sigmoid_norm". Shapes and errors as `preference_log_likelihood`.
    """
    loss = loss or PreferenceLoss()
    ratios = _in_float(ratios)
    return loss.beta * (_mean_difference if loss.loss_type[0] == "sigmoid_norm" else _difference)(ratios, loss)


def completion_log_prob(token_log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of completions from those of their tokens, the chosen half of the rows before the rejected.

    With `ld_alpha`, tokens beyond the length of the pair's shorter completion count that much (LD-DPO, Liu et al.
    2024, arXiv 2409.06411).

    Args:
        token_log_probs: [..., 2B, T], zero outside of completions.
        completion_mask: [2B, T], 1 in completions.
        ld_alpha: from 0 to 1; None is 1.

    Returns:
        [..., 2B], nats.
    """
    if ld_alpha is None:
        return token_log_probs.sum(dim=-1)
    position = completion_mask.cumsum(dim=-1)
    shared = position[..., -1].view(2, -1).amin(dim=0).repeat(2)
    weight = torch.where(position > shared[:, None], ld_alpha, 1.0) * (completion_mask != 0)
    return (token_log_probs * weight).sum(dim=-1)


# ---- Scores ----------------------------------------------------------------------------------------------------------


def _in_float(ratios: LogRatios) -> LogRatios:
    def raised(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    return ratios._replace(chosen=raised(ratios.chosen), rejected=raised(ratios.rejected))


def _scores(ratios: LogRatios, loss: PreferenceLoss) -> tuple[Tensor, Tensor]:
    """f'(ratio) of both completions, up to a constant: the log-ratio itself for the reverse KL.

    (Wang et al. 2023, arXiv 2309.16240.)
    """
    score = _SCORES.get(loss.f_divergence_type)
    if score is None:
        raise ValueError(f"unknown f_divergence_type {loss.f_divergence_type!r}; one of {', '.join(_SCORES)}")
    return score(ratios.chosen, loss), score(ratios.rejected, loss)


def _alpha_divergence(log_ratio: Tensor, loss: PreferenceLoss) -> Tensor:
    order = loss.f_alpha_divergence_coef - 1.0
    if abs(order) < 1e-6:
        return log_ratio
    return torch.expm1((order * log_ratio).clamp(max=80.0)) / order  # e^80 still fits in float32


_SCORES: Mapping[str, Callable[[Tensor, PreferenceLoss], Tensor]] = {
    "reverse_kl": lambda log_ratio, _: log_ratio,
    "forward_kl": lambda log_ratio, _: -torch.expm1(-log_ratio),
    "js_divergence": lambda log_ratio, _: math.log(2) + logsigmoid(log_ratio),
    "alpha_divergence": _alpha_divergence,
}
F_DIVERGENCES = tuple(_SCORES)


def _difference(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    chosen, rejected = _scores(ratios, loss)
    return chosen - rejected


def _mean_difference(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """The difference of scores per token."""
    if ratios.chosen_tokens is None or ratios.rejected_tokens is None:
        raise ValueError(f"{', '.join(loss.loss_type)} normalises by length: give the completions' tokens")
    chosen, rejected = _scores(ratios, loss)
    return chosen / ratios.chosen_tokens.clamp(min=1) - rejected / ratios.rejected_tokens.clamp(min=1)


# ---- Losses of one pair, as in TRL -----------------------------------------------------------------------------------


def _pair_loss(name: str) -> Callable[[LogRatios, PreferenceLoss], Tensor]:
    if name in COUPLED_LOSSES:
        raise ValueError(f"loss_type {name!r} couples pairs: {COUPLED_LOSSES[name]}")
    if name not in PAIR_LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; one of {', '.join(PAIR_LOSSES)}")
    return PAIR_LOSSES[name]


def _sigmoid(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    return -logsigmoid(loss.beta * _difference(ratios, loss))


def _sigmoid_norm(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    return -logsigmoid(loss.beta * _mean_difference(ratios, loss))


def _hinge(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    return torch.relu(1 - loss.beta * _difference(ratios, loss))


def _ipo(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """Azar et al. 2023 (arXiv 2310.12036), eq. 17, per token as TRL confirmed with its authors."""
    return (_mean_difference(ratios, loss) - 1 / (2 * loss.beta)).square()


def _exo_pair(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """Ji et al. 2024 (arXiv 2402.00856), eq. 16 for two completions."""
    margin, smoothing = loss.beta * _difference(ratios, loss), loss.label_smoothing
    won, lost = logsigmoid(margin), logsigmoid(-margin)
    return won.exp() * (won - math.log1p(-smoothing)) + lost.exp() * (lost - math.log(smoothing))


def _nca_pair(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    chosen, rejected = loss.beta * ratios.chosen, loss.beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """Chowdhury et al. 2024 (arXiv 2403.00409): unbiased when a share of the labels is flipped."""
    margin, flipped = loss.beta * _difference(ratios, loss), loss.label_smoothing
    return (-(1 - flipped) * logsigmoid(margin) + flipped * logsigmoid(-margin)) / (1 - 2 * flipped)


def _bco_pair(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    return -logsigmoid(loss.beta * ratios.chosen) - logsigmoid(-loss.beta * ratios.rejected)


def _sppo_hard(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    target = 0.5 / loss.beta
    return (ratios.chosen - target).square() + (ratios.rejected + target).square()


def _apo_zero(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7."""
    return 1 - torch.sigmoid(loss.beta * ratios.chosen) + torch.sigmoid(loss.beta * ratios.rejected)


def _apo_down(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """The same, eq. 8: for completions worse than the model's own."""
    better = torch.sigmoid(loss.beta * (ratios.chosen - ratios.rejected))
    return torch.sigmoid(loss.beta * ratios.chosen) + 1 - better


def _discopop(ratios: LogRatios, loss: PreferenceLoss) -> Tensor:
    """Lu et al. 2024 (arXiv 2406.08414), eq. 5."""
    margin = loss.beta * _difference(ratios, loss)
    modulation = torch.sigmoid(margin / loss.discopop_tau)
    return -logsigmoid(margin) * (1 - modulation) + torch.exp(-margin) * modulation


PAIR_LOSSES: Mapping[str, Callable[[LogRatios, PreferenceLoss], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
