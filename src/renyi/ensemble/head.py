"""Log-probabilities of tokens under a frozen head, without keeping the logits [N, V] in memory.

The head's weight W [V, D] needs no gradient. So the forward already computes the gradient of each token's
log-probability with respect to its hidden row, W[target] − Σ_v p_v W_v. The backward only multiplies these rows by the
upstream gradient. This takes 4NDV operations for N rows, hidden size D and vocabulary V. Nothing is computed twice.

Σ_v p_v W_v is attention with the head as keys and values. It is computed as in flash attention: block by block of the
vocabulary, with a rescaling when a greater logit is found. So each block of the head is read once for both products.

Read next: `decode.py`, generation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel

from renyi.ensemble.modes import evaluating
from renyi.errors import ConfigError

# Functions that return whole distributions use chunks of about this many logits: 16 MiB in float32.
LOGITS_PER_CHUNK = 1 << 22
# Standard deviation of the logits in the check of a head. Trained models reach it, and a cap of 30 has an effect there.
CHECKED_LOGITS = 10.0
# Names of config entries: for a factor on logits, for a divisor, and for a cap.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISOR = "logits_scaling"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Rows and vocabulary entries of one block of logits. On a CPU the block fits in the caches. On a GPU it is larger, so
# that the GPU is fully used.
BLOCK_ON_CPU, BLOCK = (1024, 1024), (8192, 8192)


class TokenScores(NamedTuple):
    """The head's scores of each target token, [N], in float32 or better. Only `log_probs` has a gradient."""

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


class LogitTransform(NamedTuple):
    """A function that some models apply to their logits after the head: `softcap · tanh(scale · z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "LogitTransform":
        """Read the transform from a model config, where Gemma, Cohere, Granite, xLSTM and others declare it."""
        config = config.get_text_config()
        scale = next((float(v) for name in _FACTORS if (v := getattr(config, name, None)) is not None), None)
        if scale is None:
            divisor = getattr(config, _DIVISOR, None)
            multiplies = config.model_type.startswith("hyperclovax")  # its multiplier has the name of a divisor
            scale = 1.0 if divisor is None else float(divisor) if multiplies else 1 / float(divisor)
        cap = next((float(v) for name in _CAPS if (v := getattr(config, name, None)) is not None), None)
        return cls(scale, cap)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, transformed: Tensor) -> Tensor | float:
        """The derivative with respect to the logits, computed from the transformed logits."""
        return self.scale if self.softcap is None else self.scale * (1 - (transformed / self.softcap).square())


def token_scores(hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform) -> TokenScores:
    """Score target tokens under a frozen language-model head.

    Args:
        hidden: last hidden states [N, D], any floating dtype; gradients flow to them.
        head: the output embedding, a linear layer with `weight` [V, D] and perhaps a `bias`. It gets no gradient.
        targets: token ids [N].
        transform: the function that the model applies to its logits after the head.

    Returns:
        Log-probability of each target (nats), entropy of each next-token distribution (nats), and whether the target
        is the most likely token, each [N]. The first two are float32, or float64 if `hidden` is float64.
    """
    bias: Tensor | None = getattr(head, "bias", None)
    return TokenScores(*_FrozenHead.apply(hidden, head.weight, bias, targets, transform))


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows_ND, device, needs_grad = hidden.detach(), hidden.device.type, ctx.needs_input_grad[0]
        if torch.is_autocast_enabled(device):
            rows_ND = rows_ND.to(torch.get_autocast_dtype(device))
        many, width = BLOCK_ON_CPU if device == "cpu" else BLOCK
        with torch.autocast(device, enabled=False):
            parts = [
                _score(part_nD, weight.detach(), bias, part_n, transform, width, needs_grad)
                for part_nD, part_n in zip(rows_ND.split(many), targets.split(many), strict=True)
            ]
        log_probs, entropy, is_top1, gradient_ND = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(gradient_ND.to(hidden.dtype))
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_log_probs[:, None].to(gradient_ND.dtype), None, None, None, None


def _score(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    transform: LogitTransform,
    width: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy and top-1 hit [N] of targets, and the gradients [N, D] of their log-probabilities.

    Sums over the vocabulary are relative to `top`, the greatest logit so far:

    - mass: Σ e^(z − top)
    - rest: the same sum without the target
    - moment: Σ e^(z − top) (z − top), from which the entropy follows
    - pull: Σ e^(z − top) dz/dh over all tokens except the target

    The gradient needs 1 − p of the target, which is computed as rest/mass. Computing it as a difference would leave
    only rounding errors if the token is almost certain.
    """
    precision = torch.promote_types(hidden_ND.dtype, torch.float32)
    lowest = torch.finfo(precision).min
    top_N = torch.full_like(targets_N, lowest, dtype=precision)
    mass_N, rest_N, moment_N, goal_N = (torch.zeros_like(top_N) for _ in range(4))
    is_top1_N = torch.zeros_like(targets_N, dtype=torch.bool)
    pull_ND = torch.zeros_like(hidden_ND, dtype=precision)
    starts = range(0, len(weight_VD), width)
    by_block = (targets_N // width).sort()
    rows_of_block = by_block.indices.split(by_block.values.bincount(minlength=len(starts)).tolist())
    for start, rows in zip(starts, rows_of_block, strict=True):
        weight_vD = weight_VD[start : start + width].to(hidden_ND.dtype)
        z_Nv = _product(hidden_ND, weight_vD.T)
        if bias_V is not None:
            z_Nv += bias_V[start : start + width]
        z_Nv = transform(z_Nv)
        before_N, top_N = top_N, torch.maximum(top_N, z_Nv.amax(dim=1))
        if len(rows):  # the rows whose target is in this block
            target = targets_N[rows] - start
            goal_N[rows] = z_Nv[rows, target]
            # If several logits are equal and greatest, the first one counts as the most likely token, as in argmax.
            is_top1_N[rows] = (z_Nv[rows].argmax(dim=1) == target) & (goal_N[rows] > before_N[rows])
        slope_Nv = transform.slope(z_Nv) if needs_grad else 1.0
        z_Nv -= top_N[:, None]
        e_Nv = z_Nv.exp()
        fell_N = (before_N - top_N).clamp(min=lowest)
        fade_N = fell_N.exp()
        # A head may give some tokens a probability of zero. The clamp makes them add nothing to the entropy.
        moment_N = fade_N * (moment_N + mass_N * fell_N) + torch.linalg.vecdot(e_Nv, z_Nv.clamp_(min=lowest))
        mass_N, rest_N = fade_N * mass_N, fade_N * rest_N
        if len(rows):
            mass_N[rows] += e_Nv[rows, target]
            e_Nv[rows, target] = 0.0
        others_N = e_Nv.sum(dim=1)
        mass_N, rest_N = mass_N + others_N, rest_N + others_N
        if needs_grad:
            if transform != LogitTransform():
                e_Nv *= slope_Nv
            pull_ND *= fade_N[:, None]
            pull_ND += _product(e_Nv.to(hidden_ND.dtype), weight_vD)
    # log1p keeps the digits of a log-probability near 0: if the target has the greatest logit, the mass is 1 + rest.
    log_mass_N = torch.log1p(rest_N + torch.expm1(goal_N - top_N))
    push_ND = (rest_N * transform.slope(goal_N))[:, None] * weight_VD[targets_N]
    return (
        goal_N - top_N - log_mass_N,
        log_mass_N - moment_N / mass_N,
        is_top1_N & (goal_N >= top_N),
        (push_ND - pull_ND) / mass_N[:, None],
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in float32 or better. On a GPU, products of half-precision factors are summed in float32."""
    precision = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype != precision:
        return torch.mm(left, right, out_dtype=precision)
    return (left @ right).to(precision)


def check_head(base: PreTrainedModel) -> None:
    """Raise `ConfigError` unless `token_scores` on the backbone's hidden states gives the model's own probabilities.

    Hidden states are multiplied by a factor, so that logits are about as large as those of a trained model. A freshly
    initialised model has logits near 0, where a cap has no effect. Logits are compared in float32, or in the model's
    precision if that is better, because bfloat16 would round away a factor such as 1.004.
    """
    head = base.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor) or base.base_model is base:
        raise ConfigError(f"{type(base).__name__} is not a causal language model with a linear head", where="model")
    if base.device.type == "meta":
        return
    ids = torch.arange(3, device=base.device)[None]
    vocabulary = len(head.weight)
    targets = torch.linspace(0, vocabulary - 1, 8, device=base.device).long()  # tokens from the whole vocabulary
    transform = LogitTransform.from_config(base.config)
    with torch.no_grad(), evaluating(base):  # a base with its own dropout gives other logits each time
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        if head.weight.is_floating_point():  # some backbones return float32, which the model then rounds
            hidden = hidden.to(head.weight.dtype)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        size = _logits_by_parts(head, hidden).std().clamp(min=torch.finfo(torch.float32).tiny)
        factor = (CHECKED_LOGITS / size).clamp(min=1.0)
        rows, row_targets = (factor * hidden).repeat_interleave(len(targets), 0), targets.repeat(len(hidden))
        ours = token_scores(rows, head, row_targets, transform).log_probs
        with _amplified(head, factor):
            logits = base(input_ids=ids, use_cache=False).logits[0]
        theirs = logits.to(ours.dtype).log_softmax(-1)[:, targets].flatten()
    # A head of another class computes in its own precision, so the comparison allows for rounding.
    tolerance = 1e-4 if logits.dtype.itemsize >= 4 else 0.05
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
        raise ConfigError(
            f"{type(base).__name__} does something to its hidden states or logits that this version does not know",
            where="model",
            hint=f"Log-likelihoods would be wrong, here by {float((ours - theirs).abs().max()):.2g} nats. "
            "Please report the architecture.",
        )


@contextmanager
def _amplified(head: nn.Module, factor: Tensor) -> Iterator[None]:
    """Multiply the head's input by a factor, and let a plain linear head compute in float32 or better."""

    def answer(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _logits_by_parts(module, factor * given[0].to(factor.dtype))

    def amplify(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0] * factor.to(given[0].dtype), *given[1:])

    is_plain = type(head) is nn.Linear
    hook = head.register_forward_hook(answer) if is_plain else head.register_forward_pre_hook(amplify)
    try:
        yield
    finally:
        hook.remove()


def _logits_by_parts(head: Any, hidden: Tensor) -> Tensor:
    """W h + b in float32 or better. Only a part of W is copied at a time."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [hidden.to(precision) @ part.to(precision).T for part in head.weight.split(BLOCK[1])]
    logits, bias = torch.cat(parts, dim=-1), getattr(head, "bias", None)
    return logits if bias is None else logits + bias
