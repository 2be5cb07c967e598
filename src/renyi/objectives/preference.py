"""The loss of preference pairs: the log-likelihood of a pair's label, and the other losses of TRL's DPOTrainer.

A pair is a prompt x with a chosen completion y⁺ and a rejected one y⁻. A policy π and a reference π_ref give each
completion a log-ratio log π(y|x) − log π_ref(y|x), and the pair a margin (Rafailov et al. 2023, arXiv 2305.18290)

    Δ = β [log-ratio(y⁺) − log-ratio(y⁻)]                                         `preference_margin`

The label has the Bradley–Terry likelihood σ(Δ). So the members of an ensemble enter the α-Rényi loss by

    ℓ_m = log σ(Δ_m)                                                              `preference_log_likelihood`

Any other loss of a single pair enters as ℓ_m = −loss_m (a Gibbs posterior). Losses and options have the names and
formulas of TRL's DPOTrainer, so an ensemble of one member equals that trainer. Some losses of TRL couple the pairs of a
batch. They have no ℓ of a single pair and are refused.

One label is one bit. Suppose annotators contradict each other on a pair and on nothing else. Then a margin of 0
predicts the labels as well as any mixture, and with ℓ = log σ(Δ) the members stay together at every α < 1. Members
separate where one reward cannot fit the pooled preferences, that is, where these are not transitive. An example is a
matter of taste that some annotators rank above all else and others below all else.

Read next: `votes.py` (several labels of one pair), `training/dpo.py` (the trainer).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Losses of TRL that have no log-likelihood of a single pair, and why.
COUPLED_LOSSES = {
    "aot": "it sorts the margins of a batch",
    "aot_unpaired": "it sorts the log-ratios of a batch",
    "sft": "it averages over the tokens of a batch",
}


@dataclass(frozen=True)
class PreferenceLoss:
    """The settings of a preference loss, under the names of TRL's DPOConfig.

    Attributes:
        beta: β, the strength of the pull to the reference; τ in the paper of "ipo".
        loss_type: one or more of `PAIR_LOSSES`; several are summed.
        loss_weights: the weight of each loss; None is 1 for all.
        label_smoothing: the share of flipped labels, for "robust" and "exo_pair".
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: the coefficient of "alpha_divergence".
        discopop_tau: the temperature τ of "discopop".
        ld_alpha: the weight of a completion's tokens beyond the length of the pair's shorter one; None is 1.
        tie_strength: ν of Davidson's model of ties, see `votes.py`; 0 is Bradley–Terry, without ties.
    """

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    tie_strength: float = 0.0


class LogRatios(NamedTuple):
    """Log-ratios of chosen and rejected completions to the reference, in nats, and the completions' lengths in tokens.

    The ratios have any shape, members first. The lengths are [B]. Only losses that normalise by length need them.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None


def preference_log_likelihood(ratios: LogRatios, loss: PreferenceLoss | None = None) -> Tensor:
    """ℓ of each pair under each member: log σ(Δ) for the "sigmoid" loss, −loss for any other.

    Args:
        ratios: [M, B] log-ratios; half precision is converted to float32.
        loss: the loss and its settings; None is Bradley–Terry with β = 0.1.

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
    """The margin Δ: σ(Δ) is the probability that the chosen completion is preferred.

    Δ is β times the difference of the two completions' log-ratios. For another f-divergence it is the difference of
    f'(ratio), and for "sigmoid_norm" the difference of the means per token. Shapes and errors are those of
    `preference_log_likelihood`.
    """
    loss = loss or PreferenceLoss()
    ratios = _in_float(ratios)
    return loss.beta * (_mean_difference if loss.loss_type[0] == "sigmoid_norm" else _difference)(ratios, loss)


def completion_log_prob(token_log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of completions, from the log-probabilities of their tokens.

    The first half of the rows are the chosen completions, the second half the rejected ones. With `ld_alpha`, tokens
    beyond the length of the pair's shorter completion have that weight (LD-DPO, Liu et al. 2024, arXiv 2409.06411).

    Args:
        token_log_probs: [..., 2B, T], zero outside of completions.
        completion_mask: [2B, T], 1 in completions.
        ld_alpha: a weight from 0 to 1; None is 1.

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
    """f'(ratio) of both completions, up to a constant (Wang et al. 2023, arXiv 2309.16240).

    For the reverse KL it is the log-ratio itself.
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
    """Azar et al. 2023 (arXiv 2310.12036), eq. 17, with means per token: TRL confirmed these with the authors."""
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
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8: for completions worse than the model's own."""
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
