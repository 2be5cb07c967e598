"""Members whose A has a covariance across entries, from one Gaussian vector a layer and Walsh–Hadamard matrices.

A holds the first rows and columns of S₁ H diag(g) H S₂: H is the Walsh–Hadamard matrix of the next power of two D, S₁
and S₂ are diagonal, g ~ N(μ, diag σ²) (WHVI, Rossi, Marmin and Filippone 2019, arXiv 1905.11248). Mean and spread
together are at most 5 I + R numbers a layer, where a Gaussian with a σ for every entry has 2 R I.

H has the entries ±D^(−1/4), so that an entry of A has the variance of an entry of g where S₁ and S₂ are ±1. In
Sylvester's order, row r of H times row i, entry by entry, is row r XOR i. So entry [r, i] of H diag(g) H is entry
r XOR i of H g, up to scale: one fast transform of g gives the whole matrix.

Read next: `gaussian.py`, which has what both kinds share.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from renyi.members.gaussian import START_STD, project_examples, spread_divergence
from renyi.members.kind import MemberLayer, Noise, register


@register
class WalshHadamardLayer(MemberLayer):
    """M members of one layer: the diagonals `left` [M, R] and `right` [M, I], μ and log σ of g [M, D], the point B."""

    kind = "walsh_hadamard"
    spreads = ("log_std",)

    def __init__(self, left_MR: Tensor, right_MI: Tensor, centre_MD: Tensor, B_MOR: Tensor):
        super().__init__()
        self.left, self.right, self.centre = (nn.Parameter(x) for x in (left_MR, right_MI, centre_MD))
        self.log_std = nn.Parameter(torch.full_like(centre_MD, math.log(START_STD)))
        self.lora_B = nn.Parameter(B_MOR)

    @classmethod
    def drawn(cls, A_MRI: Tensor, B_MOR: Tensor) -> Self:
        """PEFT's numbers become μ and the signs of S₂. A's entries have the variance of PEFT's A, but other values."""
        members, rank, features = A_MRI.shape
        size = 2 ** math.ceil(math.log2(max(rank, features, 2)))
        flat = A_MRI.flatten(1)
        flat = flat.repeat(1, -(-(size + features) // flat.shape[1]))
        right = torch.where(flat[:, size : size + features] < 0, -1.0, 1.0).to(A_MRI)
        return cls(A_MRI.new_ones(members, rank), right, flat[:, :size].clone(), B_MOR)

    @torch.no_grad()
    def set_std(self, std: float) -> None:
        self.log_std.fill_(math.log(std) if std > 0 else -math.inf)

    def std(self) -> Tensor:
        of_g = self.log_std.detach().exp().square().mean(dim=1).sqrt()
        return of_g * self.left.detach().abs().mean(dim=1) * self.right.detach().abs().mean(dim=1)

    def mean(self) -> tuple[Tensor, Tensor]:
        held: Any = self
        return self._matrix(held.centre, held.left, held.right), held.lora_B

    def matrices(self, noise: Noise | None) -> tuple[Tensor, Tensor]:
        if noise is None:
            return self.mean()
        held: Any = self
        drawn_MSD = held.centre[:, None] + self._deviation(noise)
        A_MSRI = self._matrix(drawn_MSD, held.left[:, None], held.right[:, None])
        return A_MSRI.flatten(0, 1), held.lora_B.repeat_interleave(noise.draws, dim=0)

    def project(self, x_GNI: Tensor, A_GRI: Tensor, rows: Any) -> Tensor:
        """A x with a draw of its own for each example: g = μ + σ ε ∘ t with random signs t [D]."""
        if rows.noise is None:
            return super().project(x_GNI, A_GRI, rows)
        held: Any = self
        draws = rows.noise.draws
        draws_GE, examples_GE = rows.noise_places(len(x_GNI), A_GRI.device)
        signs_GED = rows.noise.signs(self.number, draws_GE, examples_GE, held.centre.shape[1]).to(A_GRI.dtype)
        centre, left, right = (rows.of(x.repeat_interleave(draws, dim=0)) for x in (held.centre, held.left, held.right))
        deviation_GD = rows.of(self._deviation(rows.noise).flatten(0, 1))
        drawn_GED = centre[:, None] + deviation_GD[:, None] * signs_GED
        return project_examples(x_GNI, self._matrix(drawn_GED, left[:, None], right[:, None]))

    def divergence(self, origin: Mapping[str, Tensor], prior_std: float) -> Tensor:
        """KL of g from N(μ⁰, prior_std²), and the squared distances of the points S₁, S₂ and B / (2 prior_std²)."""
        moved_M = self.log_std.new_zeros(len(self.log_std))
        for name in ("centre", "left", "right", "lora_B"):
            moved_M = moved_M + (getattr(self, name) - origin[name]).square().flatten(1).sum(1)
        return moved_M / (2 * prior_std**2) + spread_divergence(self.log_std, prior_std).sum(1)

    @torch.no_grad()
    def read(self, place: int, A: Tensor, B: Tensor, kept: Mapping[str, Tensor]) -> None:
        """As in `MemberLayer`. A itself is not held: it follows from what is beside it."""
        for name, value in {"lora_B": B, **{x: kept[x] for x in self.kept(place)}}.items():
            getattr(self, name)[place].copy_(value)

    def _deviation(self, noise: Noise) -> Tensor:
        """σ ε [M, S, D]."""
        held: Any = self
        normal_SD = noise.normal(self.number, noise.draws, held.centre.shape[1], like=held.centre)
        return held.log_std.exp()[:, None] * normal_SD

    def _matrix(self, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """S₁ H diag(g) H S₂ [..., R, I] from g [..., D] and the diagonals left [..., R] and right [..., I]."""
        at = torch.arange(left.shape[-1], device=g.device)[:, None] ^ torch.arange(right.shape[-1], device=g.device)
        spread = walsh_hadamard(g) / g.shape[-1] ** 0.5
        return left[..., :, None] * spread[..., at] * right[..., None, :]


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x along the last dimension, of size D = 2^k, with H's entries ±1 in Sylvester's order: D log₂ D additions."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
        half *= 2
    return x.reshape(shape)
