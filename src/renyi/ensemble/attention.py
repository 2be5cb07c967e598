"""Attention in half precision on a CPU: plain matrix products where PyTorch's flash kernel is slow.

In training, the kernel's backward takes a third of a step at 40 tokens a row. Two matrix products and a softmax take a
quarter of the kernel's time up to 32 tokens, and as long at 256. They keep T × T numbers a head, so rows of more than
`SHORT` tokens stay with the kernel. In decoding, each row has one new token, for which the kernel is slow: products
take a ninth to a half of its time, unless one short row is all there is (`LITTLE`). See `python
benchmarks/attention.py`.

Elsewhere the kernel stays: in float32 neither is much faster, and in passes without gradients over more than `FEW`
tokens a row it depends on the machine. The choice depends on shape and precision alone, so a run that is resumed
computes the same numbers.

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
FEW = 4  # new tokens of a row
LITTLE = 1 << 17  # multiplications of a new token with keys: the kernel takes less than calling the products does
HALF = (torch.bfloat16, torch.float16)


def choose_by_length(base: PreTrainedModel) -> None:
    """Let a model on a CPU choose its attention by the tokens of the rows, if it runs PyTorch's kernel now.

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


def chooses_by_length(base: PreTrainedModel) -> bool:
    """Whether `choose_by_length` changed this model."""
    return base.config._attn_implementation == NAME


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
    device, tokens, length = query.device.type, query.shape[2], key.shape[2]
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    is_causal, scaling = kwargs.get("is_causal"), kwargs.get("scaling")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and attention_mask is None and tokens > 1
    if query.requires_grad:
        pays = module.training and tokens == length <= SHORT
    else:
        pays = tokens <= FEW and (tokens == length or not is_causal) and query.numel() // tokens * length > LITTLE
    is_plain = attention_mask is None or attention_mask.dtype == torch.bool
    others = any(kwargs.get(name) for name in ("dropout", "softcap", "output_attentions"))
    if (
        not (pays and is_plain and device == "cpu" and precision in HALF)
        or others
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if is_causal:
        attention_mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril()
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
