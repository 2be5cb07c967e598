"""Per-token log-probabilities under a frozen head, without ever holding the logits.

The head's weight needs no gradient here. So the gradient of a token's log-probability with respect to its hidden row
is computed in the forward, chunk by chunk, and the backward only scales rows by what arrives from above: 4NDV
multiply-adds for N rows, hidden size D and vocabulary V, with no recomputation and no [N, V] kept.
This file knows nothing about members or examples: it sees rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel

from renyi.errors import ConfigError

# Rows are scored in chunks of about this many logits: 16 MiB in float32, which allocators reuse from chunk to chunk.
LOGITS_PER_CHUNK = 1 << 22


class TokenScores(NamedTuple):
    """What the head says about each target token, float32 [N]; only `log_probs` carries a gradient."""

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


class LogitTransform(NamedTuple):
    """What some models do to their logits after the head: `softcap · tanh(scale · z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "LogitTransform":
        """Read the transform off a model config, where Gemma, Cohere, Granite, Falcon-H1 and others declare it."""
        config = config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if getattr(config, name, None) is not None:
                scale = float(getattr(config, name))
                break
        else:
            divisor = getattr(config, "logits_scaling", None)
            if divisor is not None:
                scale = float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def token_scores(hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform) -> TokenScores:
    """Score target tokens under a frozen language-model head.

    Args:
        hidden: last hidden states [N, D], any floating dtype; gradients flow to them.
        head: the output embedding, a linear layer with `weight` [V, D] and perhaps a `bias`; gets no gradient.
        targets: token ids [N].
        transform: what the model does to its logits after the head.

    Returns:
        Log-probability of each target (nats), entropy of each next-token distribution (nats), and whether the target
        is the most likely token: float32, float32 and bool, each [N].
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
        hidden, weight = hidden.detach(), weight.detach()
        rows = hidden.shape[0]
        needs_grad = ctx.needs_input_grad[0]
        log_probs = hidden.new_empty(rows, dtype=torch.float32)
        entropy = torch.empty_like(log_probs)
        is_top1 = torch.empty_like(log_probs, dtype=torch.bool)
        row_grad = torch.empty_like(hidden) if needs_grad else None
        chunk = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        for start in range(0, rows, chunk):
            at = slice(start, start + chunk)
            z_NV = transform(F.linear(hidden[at], weight, bias).float())
            log_p_NV = torch.log_softmax(z_NV, dim=-1)
            log_probs[at] = log_p_NV.gather(1, targets[at, None]).squeeze(1)
            is_top1[at] = log_p_NV.argmax(dim=-1) == targets[at]
            p_NV = log_p_NV.exp()
            # A head may give some tokens probability zero; they add nothing to the entropy.
            entropy[at] = -torch.linalg.vecdot(p_NV, log_p_NV.clamp_(min=torch.finfo(torch.float32).min))
            if row_grad is not None:
                dz_NV = p_NV.neg_()
                dz_NV.scatter_add_(1, targets[at, None], torch.ones_like(targets[at, None], dtype=dz_NV.dtype))
                if transform.softcap is not None:
                    dz_NV *= 1 - (z_NV / transform.softcap).square()
                row_grad[at] = (dz_NV if transform.scale == 1 else dz_NV * transform.scale).to(weight.dtype) @ weight
        ctx.save_for_backward(row_grad)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
        (row_grad,) = ctx.saved_tensors
        grad_hidden = None if row_grad is None else row_grad * grad_log_probs[:, None].to(row_grad.dtype)
        return grad_hidden, None, None, None, None


def check_head(base: PreTrainedModel) -> None:
    """Raise `ConfigError` unless our head, on the backbone's hidden states, gives the model's own probabilities."""
    head = base.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor) or base.base_model is base:
        raise ConfigError(f"{type(base).__name__} is not a causal language model with a linear head", where="model")
    if base.device.type == "meta":
        return
    ids = torch.arange(3, device=base.device)[None]
    targets = torch.linspace(
        0, head.weight.shape[0] - 1, 8, device=base.device
    ).long()  # tokens all over the vocabulary
    training = base.training
    base.eval()  # a base with dropout of its own answers differently each time
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.train()  # on a CPU, bitsandbytes repacks a layer for good in evaluation; it has no gradient then
    with torch.no_grad():
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        transform = LogitTransform.from_config(base.config)
        rows, row_targets = hidden.repeat_interleave(len(targets), 0), targets.repeat(len(hidden))
        ours = token_scores(rows, head, row_targets, transform).log_probs
        theirs = base(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)[:, targets].flatten()
    base.train(training)
    if not torch.allclose(ours, theirs, rtol=0.05, atol=0.05):
        raise ConfigError(
            f"{type(base).__name__} does something to its hidden states or logits that this version does not know",
            where="model",
            hint="Log-likelihoods would be wrong. Please report the architecture.",
        )
