"""M LoRA adapters round one frozen layer, applied in one pass.

The rows that come in are *member-major*: the first 1/M of them belong to member 0, the next to member 1, and so
on. This file knows nothing about transformers, PEFT or losses; it sees a layer and stacked matrices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class MemberSelection:
    """Which members the rows of the next forward belong to; shared by all layers of an ensemble.

    `members` is None for all of them in order, or a tuple of member indices; the empty tuple is the base alone.
    """

    def __init__(self) -> None:
        self.members: tuple[int, ...] | None = None

    @contextmanager
    def using(self, members: Sequence[int]) -> Iterator[None]:
        """Select `members` for the forwards inside. A backward under gradient checkpointing must run inside, too."""
        before, self.members = self.members, tuple(members)
        try:
            yield
        finally:
            self.members = before


class JointLora(nn.Module):
    """A frozen layer plus one low-rank update a member: `y_m = base(x_m) + scaling · B_m A_m dropout(x_m)`.

    The base layer is called, never copied or inspected, so a quantised one stays quantised.

    Args:
        base_layer: the frozen layer, in features I to out features O on the last dimension.
        lora_A: [M, R, I].
        lora_B: [M, O, R].
        scaling: factor on the update (`lora_alpha / r`, or `lora_alpha / √r` with rsLoRA).
        dropout: probability of dropping an input of the update, drawn apart for every row.
        selection: which members the incoming rows belong to.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
        selection: MemberSelection,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.selection = selection

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map member-major rows [M·N, …, I] to [M·N, …, O] (or [1, M·N, I], the members one after another)."""
        result = self.base_layer(x, *args, **kwargs)
        A_MRI: Tensor = self.lora_A
        B_MOR: Tensor = self.lora_B
        if self.selection.members is not None:
            if not self.selection.members:
                return result
            A_MRI, B_MOR = A_MRI[list(self.selection.members)], B_MOR[list(self.selection.members)]
        num_members, _, in_features = A_MRI.shape
        rows = x.numel() // in_features
        if rows % num_members:
            raise ValueError(f"{rows} rows do not divide among {num_members} members: rows must be member-major")
        x_MNI = self.lora_dropout(x.to(A_MRI.dtype)).reshape(num_members, -1, in_features)
        low_MNR = torch.bmm(x_MNI, A_MRI.transpose(1, 2))
        result_MNO = result.reshape(num_members, -1, result.shape[-1])
        if result.dtype == low_MNR.dtype:
            updated = torch.baddbmm(result_MNO, low_MNR, B_MOR.transpose(1, 2), alpha=self.scaling)
        else:  # a half-precision base under float32 adapters without autocast: add in float32, as PEFT does
            updated = result_MNO + self.scaling * torch.bmm(low_MNR, B_MOR.transpose(1, 2))
        return updated.to(result.dtype).view_as(result)

    def extra_repr(self) -> str:
        members, rank, _ = self.lora_A.shape
        return f"members={members}, r={rank}, scaling={self.scaling:g}"
