"""Members that are samples: points that training moves by gradient and noise.

What moves them is in `renyi.training.langevin`. In every other way they are points.
"""

from renyi.members.kind import register
from renyi.members.point import PointLayer


@register
class LangevinLayer(PointLayer):
    """The LoRA adapters of M members in one layer, each a sample of the posterior."""

    kind = "langevin"
