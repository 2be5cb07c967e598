"""Attention in half-precision training on a CPU: plain matrix products for short rows.

There, the backward of PyTorch's flash kernel takes a third of a training step at 40 tokens a row. Two matrix products
and a softmax take a quarter of the kernel's time up to 32 tokens, and as long at 256 (`python
benchmarks/attention.py`). They keep T × T numbers a head, so rows of more than `SHORT` tokens stay with the kernel.
So do float32 and passes without gradients, where the kernel is faster. The choice depends on shape and precision
alone, so a run that is resumed computes the same numbers.

Read next: `joint.py`, which runs the base.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "renyi_sdpa_by_length"
SHORT = 128  # tokens
_HALF = (torch.bfloat16, torch.float16)


def choose_by_length(base: PreTrainedModel) -> None:
    """Let a model on a CPU choose its attention by the length of the rows, if it runs PyTorch's kernel now.

    A model that was loaded with another `attn_implementation` keeps it. So does one whose layers do not call attention
    by its name, or that has parts with attention of their own (vision towers).
    """
    config = base.config
    if base.device.type != "cpu" or config._attn_implementation != "sdpa" or config.sub_configs:
        return
    if base._can_set_attn_implementation():  # noqa: SLF001 - it has no public form, and without it a warning is logged
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        base.set_attn_implementation(NAME)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, with the arguments and the result of its `sdpa_attention_forward`.

    Args:
        module: the attention layer.
        query: [N, H, T, D].
        key: [N, G, L, D], each shared by H/G heads.
        value: [N, G, L, D].
        attention_mask: [N or 1, 1, T, L], true where a token may look; None for a causal mask.
        kwargs: `scaling`, `is_causal`, and whatever else the model gives.

    Returns:
        [N, T, H, D], and None for the attention weights.
    """
    device = query.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    is_training = module.training and query.requires_grad and device == "cpu" and precision in _HALF
    is_short = query.shape[2] == key.shape[2] <= SHORT
    is_plain = attention_mask is None or attention_mask.dtype == torch.bool
    others = any(kwargs.get(name) for name in ("dropout", "softcap", "output_attentions"))
    if not (is_training and is_short and is_plain) or others or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    is_causal, scaling = kwargs.get("is_causal"), kwargs.get("scaling")
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = query.to(precision), key.to(precision), value.to(precision)
    return products(query, key, value, attention_mask, scaling), None


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention by two matrix products and a softmax, which sums in float32 or better; shapes as in `attend`."""
    (rows, heads, tokens, _), groups = query.shape, key.shape[1]
    # Heads that share a key become rows of one matrix product, so keys are not copied for each head.
    query_NGRD = (query * scaling).reshape(rows, groups, heads // groups * tokens, -1)
    scores = (query_NGRD @ key.transpose(2, 3)).unflatten(2, (heads // groups, tokens))
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask[:, :, None]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights.flatten(2, 3) @ value).reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous()
