"""Members that are points: each member is one LoRA adapter, without noise.

Read next: `layer.py`, which applies the adapters.
"""

from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from renyi.members.kind import MemberLayer, register


@register
class PointLayer(MemberLayer):
    """The LoRA adapters of M members in one layer."""

    kind = "point"
    is_random = False

    def __init__(self, A_MRI: Tensor, B_MOR: Tensor):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(A_MRI), nn.Parameter(B_MOR)

    @classmethod
    def drawn(cls, A_MRI: Tensor, B_MOR: Tensor) -> Self:
        return cls(A_MRI, B_MOR)

    def divergence(self, origin: Mapping[str, Tensor], prior_std: float) -> Tensor:
        """‖φ_m − φ_m⁰‖² / (2σ²): the KL divergence of a point, up to a constant that does not depend on φ_m."""
        square_M = (self.lora_A - origin["lora_A"]).square().sum((1, 2))
        square_M = square_M + (self.lora_B - origin["lora_B"]).square().sum((1, 2))
        return square_M / (2 * prior_std**2)
