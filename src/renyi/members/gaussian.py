"""Members that are Gaussians: the entries of A are independent normal numbers, and B is a point.

With one member, α → 0 and a prior this is mean-field variational LoRA. BLoB (Wang et al. 2024, arXiv 2406.11675) has
the same objective with another parameterisation of σ. B is a point because it starts at 0: noise in A then does
nothing, and members start equal to the base.

Read next: `layer.py`, which applies the adapters.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from renyi.members.kind import MemberLayer, Noise, register

START_STD = 0.01


@register
class GaussianLayer(MemberLayer):
    """A ~ N(μ, diag σ²), entry by entry, for M members in one layer. The parameters hold μ, log σ and B."""

    kind = "gaussian"
    spreads = ("log_std",)

    def __init__(self, A_MRI: Tensor, B_MOR: Tensor):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(A_MRI), nn.Parameter(B_MOR)
        self.log_std = nn.Parameter(torch.full_like(A_MRI, math.log(START_STD)))

    @classmethod
    def drawn(cls, A_MRI: Tensor, B_MOR: Tensor) -> Self:
        return cls(A_MRI, B_MOR)

    @torch.no_grad()
    def set_std(self, std: float) -> None:
        self.log_std.fill_(math.log(std) if std > 0 else -math.inf)

    def std(self) -> Tensor:
        return self.log_std.detach().exp().mean(dim=(1, 2))

    def matrices(self, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Without noise the mean. With noise the draws A = μ_m + σ_m ε_s, which `project` turns for each example."""
        if noise is None:
            return self.mean()
        A_MRI, B_MOR = self.mean()
        held: Any = self
        normal_SRI = noise.normal(self.number, noise.draws, *A_MRI.shape[1:], like=A_MRI)
        drawn_MSRI = A_MRI[:, None] + held.log_std.exp()[:, None] * normal_SRI
        return drawn_MSRI.flatten(0, 1), B_MOR.repeat_interleave(noise.draws, dim=0)

    def project(self, x_GNI: Tensor, A_GRI: Tensor, rows: Any) -> Tensor:
        """A x with a draw of its own for each example: A = μ + σ ε ∘ (r sᵀ), with random signs r [R] and s [I].

        The noise of two examples is then uncorrelated, though they share ε (flipout, Wen et al. 2018, arXiv
        1803.04386). Adapters are low, so the matrices of all examples are smaller than what they are multiplied by.
        """
        if rows.noise is None:
            return super().project(x_GNI, A_GRI, rows)
        rank = A_GRI.shape[1]
        draws_GE, examples_GE = rows.noise_places(len(x_GNI), A_GRI.device)
        signs = rows.noise.signs(self.number, draws_GE, examples_GE, rank + A_GRI.shape[2]).to(A_GRI.dtype)
        mean_GRI = rows.of(self.mean()[0].repeat_interleave(rows.noise.draws, dim=0))
        turned_GERI = (A_GRI - mean_GRI)[:, None] * signs[..., :rank, None] * signs[..., None, rank:]
        return project_examples(x_GNI, mean_GRI[:, None] + turned_GERI)

    def divergence(self, origin: Mapping[str, Tensor], prior_std: float) -> Tensor:
        """KL(N(μ, σ²) ‖ N(μ⁰, prior_std²)) over the entries of A, and ‖B − B⁰‖² / (2 prior_std²) for the point B."""
        moved_M = (self.lora_A - origin["lora_A"]).square().sum((1, 2))
        moved_M = moved_M + (self.lora_B - origin["lora_B"]).square().sum((1, 2))
        return moved_M / (2 * prior_std**2) + spread_divergence(self.log_std, prior_std).sum((1, 2))


def project_examples(x_GNI: Tensor, A_GERI: Tensor) -> Tensor:
    """A x [G, N, R] where each of the E examples in a member's N rows has a matrix of its own."""
    examples = A_GERI.shape[1]
    by_example = x_GNI.unflatten(1, (examples, -1)).flatten(0, 1)
    low = torch.bmm(by_example, A_GERI.flatten(0, 1).transpose(1, 2))
    return low.view(*x_GNI.shape[:2], low.shape[-1])


def spread_divergence(log_std: Tensor, prior_std: float) -> Tensor:
    """KL(N(0, σ²) ‖ N(0, prior_std²)) of each entry, nats, from log σ."""
    log_ratio = 2 * (log_std - math.log(prior_std))
    return 0.5 * (log_ratio.exp() - 1 - log_ratio)
