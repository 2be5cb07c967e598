"""The reward heads of M members: a row of weights each, in the place of a base's own head with one output.

A head is trained whole, beside a member's low-rank updates. A member's folder holds it as PEFT does
(`modules_to_save`). Read next: `adapters.py`, which puts it there, and `stack.py`, which handles it with the members'
other tensors.
"""

import torch
from torch import Tensor, nn

from renyi.errors import EnsembleFormatError
from renyi.members.layer import MemberSelection

HEAD_NAME = "score"  # of the head in transformers' models that rate a sequence


class MemberHead(nn.Module):
    """Maps member-major rows [M·N, …, D] to rewards [M·N, …, 1], each row by the head of its member.

    Args:
        weight: of the M heads, [M, 1, D].
        selection: the members that the incoming rows belong to.
    """

    def __init__(self, weight: Tensor, selection: MemberSelection):
        super().__init__()
        self.weight, self.selection = nn.Parameter(weight), selection

    def forward(self, x: Tensor) -> Tensor:
        if self.selection.members == ():
            raise ValueError("a base without members has no head")
        noise = self.selection.noise
        weight_M1D = self.weight if noise is None else self.weight.repeat_interleave(noise.draws, dim=0)
        weight_M1D = self.selection.of(weight_M1D)
        x_MND = x.to(weight_M1D.dtype).reshape(len(weight_M1D), -1, x.shape[-1])
        return torch.bmm(x_MND, weight_M1D.transpose(1, 2)).reshape(*x.shape[:-1], 1)

    @torch.no_grad()
    def read(self, place: int, weight: Tensor | None, where: str) -> None:
        """Fill one place with a head [1, D] that was saved.

        Raises:
            EnsembleFormatError: the adapter has no head, or one of another size.
        """
        if weight is None:
            hint = "Give adapters that were trained as reward models, such as those of `renyi reward`."
            raise EnsembleFormatError("holds no reward head", where=where, hint=hint)
        if weight.shape != self.weight.shape[1:]:
            what = f"{HEAD_NAME} has shape {tuple(weight.shape)} where {tuple(self.weight.shape[1:])} is needed"
            raise EnsembleFormatError(what, where=where, hint="Members of one ensemble share their base model.")
        self.weight[place].copy_(weight)
