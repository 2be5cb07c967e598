"""Clip gradients member by member, so that each member takes the step that it would take in a run of its own."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_by_member(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each member's gradient, in place, to a norm of at most `max_norm`, as `clip_grad_norm_` does for a model.

    Args:
        parameters: stacked over the members [M, …]; those without a gradient are skipped.
        max_norm: the greatest norm of one member's gradient, over all of its parameters.

    Returns:
        The norms before clipping [M], in float32 or better.
    """
    stacked = [p.grad for p in parameters if p.grad is not None]
    norms_M = torch.stack([_at_least_float32(g).flatten(1).norm(dim=1) for g in stacked]).norm(dim=0)
    factor_M = (max_norm / (norms_M + 1e-6)).clamp(max=1.0)  # torch's own epsilon
    for grad in stacked:
        grad.mul_(factor_M.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
    return norms_M


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
