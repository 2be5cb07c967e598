"""A frozen layer with the adapters of M members, applied in one pass.

The rows that come in are *member-major*: the first 1/M of them belong to member 0, the next to member 1, and so
on. What a member consists of is the business of its kind (`kind.py`); this file sees a layer and stacked matrices.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from renyi.members.kind import MemberLayer, Noise


class MemberSelection:
    """Which members, examples and noise the rows of the next forward see; shared by all layers of an ensemble.

    Attributes:
        members: None for all of them in order, or a tuple of member indices; the empty tuple is the base alone.
        paired: whether each of `members` has one row of its own, and may come several times.
        examples: which examples of the step's batch the rows are, the same for every member unless `paired`; None
            for all of them in order. Only noise that differs from row to row asks for it.
        noise: of the training step; None where every member is its mean.
    """

    def __init__(self) -> None:
        self.members: tuple[int, ...] | None = None
        self.paired = False
        self.examples: Tensor | None = None
        self.noise: Noise | None = None
        self._index: Tensor | None = None
        self._first: Tensor | None = None
        self._looks_for_first = False

    @contextmanager
    def using(self, members: Sequence[int], paired: bool = False, examples: Tensor | None = None) -> Iterator[None]:
        """Select `members` for the forwards inside."""
        with self._set(tuple(members), paired, examples, self.noise):
            yield

    def as_now(self) -> AbstractContextManager[None]:
        """A context, for later, in which all is selected as now: there, checkpointed blocks run again."""
        return self._set(self.members, self.paired, self.examples, self.noise)

    @contextmanager
    def _set(
        self, members: tuple[int, ...] | None, paired: bool, examples: Tensor | None, noise: Noise | None
    ) -> Iterator[None]:
        before = self.members, self.paired, self.examples, self.noise, self._index
        self.members, self.paired, self.examples, self.noise, self._index = members, paired, examples, noise, None
        try:
            yield
        finally:
            self.members, self.paired, self.examples, self.noise, self._index = before

    @contextmanager
    def of_examples(self, examples: Tensor) -> Iterator[None]:
        """The forwards inside run these examples of the step's batch only."""
        before, self.examples = self.examples, examples
        try:
            yield
        finally:
            self.examples = before

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """The forward inside has the same rows for every member: nothing tells them apart before a joint layer."""
        self._looks_for_first = not self.paired
        try:
            yield
        finally:
            self._first, self._looks_for_first = None, False

    def is_repeated(self, x: Tensor) -> bool:
        """Whether all members have the same rows in `x`: the input of the first joint layer, and of those beside it."""
        if self._looks_for_first:
            self._first, self._looks_for_first = x, False
        return x is self._first

    def of(self, stacked: Tensor) -> Tensor:
        """The matrices of the selected members from those of all, [M, …]."""
        if self.members is None:
            return stacked
        if self._index is None:  # once for all layers, for a GPU waits for it
            self._index = torch.tensor(self.members, device=stacked.device)
        return stacked[self._index]


class JointLayer(nn.Module):
    """A frozen layer plus one low-rank update a member: `y_m = base(x_m) + scaling · B_m A_m dropout(x_m)`.

    The base layer is called, never copied or inspected, so a quantised one stays quantised.

    Attributes:
        acting: matrices A [K, R, I] and B [K, O, R] to use in the members' place; None for the members themselves.

    Args:
        base_layer: the frozen layer, in features I to out features O on the last dimension.
        members: the members of this layer, of any kind.
        scaling: factor on the update (`lora_alpha / r`, or `lora_alpha / √r` with rsLoRA).
        dropout: probability of dropping an input of the update, drawn apart for every row.
        selection: which members the incoming rows belong to.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        members: MemberLayer,
        scaling: float,
        dropout: float,
        selection: MemberSelection,
    ):
        super().__init__()
        self.base_layer, self.members = base_layer, members
        self.acting: tuple[Tensor, Tensor] | None = None
        self.scaling = scaling
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.selection = selection

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map member-major rows [M·N, …, I] to [M·N, …, O] (or [1, M·N, I], the members one after another)."""
        if self.selection.members == ():
            return self.base_layer(x, *args, **kwargs)
        A_MRI, B_MOR = self.members.matrices(self.selection.noise) if self.acting is None else self.acting
        A_MRI, B_MOR = self.selection.of(A_MRI), self.selection.of(B_MOR)
        num_members, _, in_features = A_MRI.shape
        rows = x.numel() // in_features
        if rows % num_members:
            raise ValueError(f"{rows} rows do not divide among {num_members} members: rows must be member-major")
        if self.selection.is_repeated(x) and not x.requires_grad:
            result = self.base_layer(x.reshape(num_members, -1, in_features)[0], *args, **kwargs)
            result = result.expand(num_members, *result.shape).reshape(*x.shape[:-1], result.shape[-1])
        elif (operands := self._as_one_node(x, A_MRI, B_MOR)) is not None:
            with torch.autocast(x.device.type, enabled=False):
                return _JointLinear.apply(*operands, self.scaling)
        else:
            result = self.base_layer(x, *args, **kwargs)
        x_MNI = self.lora_dropout(x.to(A_MRI.dtype)).reshape(num_members, -1, in_features)
        low_MNR = self.members.project(x_MNI, A_MRI, self.selection)
        result_MNO = result.reshape(num_members, -1, result.shape[-1])
        if result.dtype == low_MNR.dtype:
            updated = torch.baddbmm(result_MNO, low_MNR, B_MOR.transpose(1, 2), alpha=self.scaling)
        else:  # a half-precision base under float32 adapters without autocast: add in float32, as PEFT does
            updated = result_MNO + self.scaling * torch.bmm(low_MNR, B_MOR.transpose(1, 2))
        return updated.to(result.dtype).view_as(result)

    def _as_one_node(self, x: Tensor, A_MRI: Tensor, B_MOR: Tensor) -> tuple[Tensor | None, ...] | None:
        """Arguments for `_JointLinear` in their common precision; None where the layer must be called."""
        layer = self.base_layer
        if not self.training or type(layer) is not nn.Linear or not isinstance(self.lora_dropout, nn.Identity):
            return None
        if type(self.members).project is not MemberLayer.project:
            return None  # the one node knows no noise that differs from row to row
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            return None  # accelerate brings offloaded weights in this way
        precision = _common_dtype(x, layer.weight, A_MRI)
        if precision is None or (precision == torch.float32 and len(A_MRI) == 1):
            return None  # one member is PEFT's adapter to the last digit, its order of sums included
        return tuple(None if t is None else t.to(precision) for t in (x, layer.weight, layer.bias, A_MRI, B_MOR))

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}"


def _common_dtype(x: Tensor, weight: Tensor, adapter: Tensor) -> torch.dtype | None:
    """What a matrix product of the three is computed in, if that is one precision for all."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == weight.dtype == adapter.dtype else None


class _JointLinear(torch.autograd.Function):
    """A frozen linear layer and its members' updates as one node: updates are added where the base's product lies.

    Autograd by itself copies the layer's output in the forward and adds two gradients by its input in the backward. A
    second derivative is not to be had here; evaluation mode takes the other way.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A_MRI: Tensor, B_MOR: Tensor, scaling: float
    ) -> Tensor:
        result = F.linear(x, weight, bias)
        x_MNI = x.reshape(len(A_MRI), -1, x.shape[-1])
        low_MNR = torch.bmm(x_MNI, A_MRI.transpose(1, 2))
        result.view(len(A_MRI), -1, result.shape[-1]).baddbmm_(low_MNR, B_MOR.transpose(1, 2), alpha=scaling)
        ctx.save_for_backward(x_MNI, low_MNR, weight, A_MRI, B_MOR)
        ctx.scaling, ctx.shape = scaling, x.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_MNI, low_MNR, weight, A_MRI, B_MOR = ctx.saved_tensors
        grad_MNO = grad.reshape(len(A_MRI), -1, grad.shape[-1])
        grad_low_MNR = torch.bmm(grad_MNO, B_MOR).mul_(ctx.scaling)
        grad_B_MOR = torch.bmm(grad_MNO.transpose(1, 2), low_MNR).mul_(ctx.scaling)
        grad_A_MRI = torch.bmm(grad_low_MNR.transpose(1, 2), x_MNI)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).view(x_MNI.shape).baddbmm_(grad_low_MNR, A_MRI).view(ctx.shape)
        return grad_x, None, None, grad_A_MRI, grad_B_MOR, None
