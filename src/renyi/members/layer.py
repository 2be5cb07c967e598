"""A frozen layer with the adapters of M members, applied in one pass.

The incoming rows are *member-major*: the first 1/M of them belong to member 0, the next 1/M to member 1, and so on. The
kind of the members (`kind.py`) provides the stacked matrices.

Read next: `stack.py`, which handles the layers of a whole ensemble.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from renyi.members.kind import MemberLayer, Noise

_HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 16  # of all members. The small products of so few are faster in float32 (`python benchmarks/ragged.py`)


class MemberSelection:
    """The members, the examples and the noise of the rows in the next forward. All layers of an ensemble share it.

    Attributes:
        members: a tuple of member indices; None for all members in order, the empty tuple for the base alone.
        paired: whether each entry of `members` belongs to one row. A member may then occur several times.
        examples: the places of the rows' examples in the optimizer step, [rows]; None if nobody said. Unless `paired`,
            they are the same for every member. Both rows of a preference pair have the same place. Only noise that
            differs between examples needs this.
        noise: the noise of the training step; None if every member is its mean.
    """

    def __init__(self) -> None:
        self.members: tuple[int, ...] | None = None
        self.paired = False
        self.examples: Tensor | None = None
        self.noise: Noise | None = None
        self._index: Tensor | None = None
        self._first: Tensor | None = None
        self._looks_for_first = False
        self._cast: tuple[Tensor, int, Tensor] | None = None  # an input, its version, and the input in half precision
        self._shares_casts = False

    @contextmanager
    def using(self, members: Sequence[int], paired: bool = False, examples: Tensor | None = None) -> Iterator[None]:
        """Select `members` for the forwards inside."""
        with self._set(tuple(members), paired, examples, self.noise):
            yield

    def as_now(self) -> AbstractContextManager[None]:
        """A context for later use in which the selection is as it is now. Checkpointed blocks run again in it."""
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

    def noise_places(self, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The draw and the example of the rows, each [G, E]: E examples under each of G matrices; `paired`: E = 1."""
        assert self.noise is not None
        assert self.examples is not None  # the joint forward sees to it
        members = torch.arange(groups, device=device) if self.members is None else self._places(device)
        draws_G1, examples = (members % self.noise.draws)[:, None], self.examples.to(device)
        examples_GE = examples[:, None] if self.paired else examples.expand(groups, -1)
        return draws_G1.expand_as(examples_GE), examples_GE

    @contextmanager
    def of_examples(self, examples: Tensor) -> Iterator[None]:
        """Say which examples of the optimizer step the rows in the forwards inside are."""
        before, self.examples = self.examples, examples
        try:
            yield
        finally:
            self.examples = before

    @contextmanager
    def one_forward(self, repeats: bool) -> Iterator[None]:
        """Run one forward inside, in which layers share what they do to the same input.

        Args:
            repeats: whether every member has the same rows until the first joint layer.
        """
        self._looks_for_first, self._shares_casts = repeats and not self.paired, True
        try:
            yield
        finally:
            self._first, self._looks_for_first, self._cast, self._shares_casts = None, False, None, False

    def is_repeated(self, x: Tensor) -> bool:
        """Whether all members have the same rows in `x`.

        It is true for the input of the first joint layer, and for other joint layers that get the same tensor."""
        if self._looks_for_first:
            self._first, self._looks_for_first = x, False
        return x is self._first

    def cast(self, x: Tensor, precision: torch.dtype) -> Tensor:
        """An input in the precision of a product. Layers with the same input (q, k and v) share one copy."""
        if x.dtype == precision or not self._shares_casts or torch.compiler.is_compiling():
            return x.to(precision)
        kept = self._cast
        if kept is None or kept[0] is not x or kept[1] != x._version or kept[2].dtype != precision:  # noqa: SLF001
            kept = self._cast = x, x._version, x.to(precision)  # noqa: SLF001 - the version has no other name
        return kept[2]

    def of(self, stacked: Tensor) -> Tensor:
        """The matrices of the selected members, from the matrices of all members [M, …]."""
        return stacked if self.members is None else stacked[self._places(stacked.device)]

    def _places(self, device: torch.device) -> Tensor:
        if self._index is None:  # made once for all layers, because a GPU has to wait for it
            self._index = torch.tensor(self.members, device=device)
        return self._index


class JointLayer(nn.Module):
    """A frozen layer plus one low-rank update per member: `y_m = base(x_m) + scaling · B_m A_m dropout(x_m)`.

    The base layer is never changed, so a quantised layer stays quantised.

    Attributes:
        acting: matrices A [K, R, I] and B [K, O, R] to use instead of the members' own; None for the members' own.
        rounded: the same in the precision of a half-precision base, for more than `FEW_ROWS`; else None.
        cast: the frozen weight and bias in the precision of training, inside `MemberStack.casting`; else None.

    Args:
        base_layer: the frozen layer, from I to O features on the last dimension.
        members: the members of this layer, of any kind.
        scaling: factor on the update (`lora_alpha / r`, or `lora_alpha / √r` with rsLoRA).
        dropout: probability of dropping an input of the update; each row has its own draw.
        selection: the members that the incoming rows belong to.
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
        self.rounded: tuple[Tensor, Tensor] | None = None
        self.cast: tuple[Tensor, Tensor | None] | None = None
        self.scaling = scaling
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.selection = selection

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map member-major rows [M·N, …, I] to [M·N, …, O]. A packed row [1, M·N, I] has the members in sequence."""
        if self.selection.members == ():
            return self.base_layer(x, *args, **kwargs)
        own = self.members.matrices(self.selection.noise) if self.acting is None else self.acting
        rows = x.numel() // x.shape[-1]
        A_MRI, B_MOR = own if self.rounded is None or _are_few(rows, x.device) else self.rounded
        A_MRI, B_MOR = self.selection.of(A_MRI), self.selection.of(B_MOR)
        num_members, _, in_features = A_MRI.shape
        if rows % num_members:
            raise ValueError(f"{rows} rows do not divide among {num_members} members: rows must be member-major")
        if self.selection.is_repeated(x) and not x.requires_grad:
            result = self.base_layer(x.reshape(num_members, -1, in_features)[0], *args, **kwargs)
            result = result.expand(num_members, *result.shape).reshape(*x.shape[:-1], result.shape[-1])
        elif (operands := self._as_one_node(x, A_MRI, B_MOR)) is not None:
            rate = 0.0 if isinstance(self.lora_dropout, nn.Identity) else self.lora_dropout.p
            with torch.autocast(x.device.type, enabled=False):
                return _JointLinear.apply(*operands, self.scaling, rate)
        else:
            result = self.base_layer(x, *args, **kwargs)
        x_MNI = self._dropped(x.to(A_MRI.dtype).reshape(num_members, -1, in_features), _common_dtype(x, result, A_MRI))
        low_MNR = self.members.project(x_MNI, A_MRI, self.selection)
        result_MNO = result.reshape(num_members, -1, result.shape[-1])
        is_wider = result.dtype in _HALF and low_MNR.dtype == torch.float32  # then add in float32, as PEFT does
        if is_wider or result.dtype == low_MNR.dtype:
            B_MRO = B_MOR.transpose(1, 2)
            updated = torch.baddbmm(result_MNO.to(low_MNR.dtype), low_MNR, B_MRO, alpha=self.scaling)
        else:
            updated = result_MNO + self.scaling * torch.bmm(low_MNR, B_MOR.transpose(1, 2))
        return updated.to(result.dtype).view_as(result)

    def _dropped(self, x_MNI: Tensor, precision: torch.dtype | None) -> Tensor:
        """The input of the update, some of it dropped in training."""
        if _is_pefts(len(x_MNI), precision) or not self.training or type(self.lora_dropout) is not nn.Dropout:
            return self.lora_dropout(x_MNI)
        kept_MNI, share = draw_kept(x_MNI, self.lora_dropout.p)
        return x_MNI * kept_MNI / share

    def _as_one_node(self, x: Tensor, A_MRI: Tensor, B_MOR: Tensor) -> tuple[Tensor | None, ...] | None:
        """Arguments for `_JointLinear` in their common precision; None if `base_layer` itself must be called."""
        layer = self.base_layer
        if (
            not self.training
            or type(layer) is not nn.Linear
            or type(self.lora_dropout) not in (nn.Identity, nn.Dropout)
        ):
            return None
        if type(self.members).project is not MemberLayer.project:
            return None  # `_JointLinear` cannot apply noise that differs between rows
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            return None  # accelerate loads offloaded weights in hooks
        precision = _common_dtype(x, layer.weight, A_MRI)
        if precision is None or _is_pefts(len(A_MRI), precision):
            return None
        frozen: tuple[Tensor, Tensor | None] = layer.weight, layer.bias
        if self.cast is not None and self.cast[0].dtype == precision:
            frozen = self.cast
        weight, bias = frozen[0].to(precision), None if frozen[1] is None else frozen[1].to(precision)
        return self.selection.cast(x, precision), weight, bias, A_MRI.to(precision), B_MOR.to(precision)

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}"


def _are_few(rows: int, device: torch.device) -> bool:
    """Whether updates of so few rows take less time in float32 than in half precision, as on a CPU."""
    return rows <= FEW_ROWS and device.type == "cpu"


def _is_pefts(num_members: int, precision: torch.dtype | None) -> bool:
    """Whether this is one member in full precision. It sums and drops as PEFT's adapter does, to the last digit."""
    return num_members == 1 and precision not in _HALF


def _common_dtype(x: Tensor, weight: Tensor, adapter: Tensor) -> torch.dtype | None:
    """The precision of a matrix product of the three; None if they have different ones."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == weight.dtype == adapter.dtype else None


def draw_kept(like: Tensor, rate: float) -> tuple[Tensor, float]:
    """Which entries dropout keeps, as 1 and 0 in the shape and dtype of `like`, and the exact share that it keeps.

    On a CPU each entry takes 16 bits of the generator, so that the rate is a multiple of 2⁻¹⁶. PyTorch's own draw takes
    five times as long there on processors without MKL's generators. A compiled layer draws in its own kernel.
    """
    if rate >= 1:
        return torch.zeros_like(like), 1.0
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty_like(like).bernoulli_(1 - rate), 1 - rate
    dropped = min(round(rate * 65536), 65535)  # of the 65,536 values of 16 bits
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: like.numel()].ge_(dropped - 32768)
    return bits.to(like.dtype).view(like.shape), 1 - dropped / 65536


class _JointLinear(torch.autograd.Function):
    """A frozen linear layer and its members' updates as one autograd node. Updates are added to the output in place.

    Without it, autograd would copy the layer's output in the forward and add two gradients of its input in the
    backward. This node has no second derivative. It is used in training mode only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A_MRI: Tensor,
        B_MOR: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        result = F.linear(x, weight, bias)
        x_MNI = x.reshape(len(A_MRI), -1, x.shape[-1])
        kept_MNI, share = draw_kept(x_MNI, dropout) if dropout > 0 else (None, 1.0)
        ctx.scaling, ctx.shape = scaling / share, x.shape
        low_MNR = torch.bmm(x_MNI if kept_MNI is None else x_MNI * kept_MNI, A_MRI.transpose(1, 2))
        result.view(len(A_MRI), -1, result.shape[-1]).baddbmm_(low_MNR, B_MOR.transpose(1, 2), alpha=ctx.scaling)
        ctx.save_for_backward(x_MNI, kept_MNI, low_MNR, weight, A_MRI, B_MOR)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None]:
        x_MNI, kept_MNI, low_MNR, weight, A_MRI, B_MOR = ctx.saved_tensors
        grad_MNO = grad.reshape(len(A_MRI), -1, grad.shape[-1])
        grad_low_MNR = torch.bmm(grad_MNO, B_MOR).mul_(ctx.scaling)
        grad_B_MOR = torch.bmm(grad_MNO.transpose(1, 2), low_MNR).mul_(ctx.scaling)
        dropped_MNI = x_MNI if kept_MNI is None else x_MNI * kept_MNI
        grad_A_MRI = torch.bmm(grad_low_MNR.transpose(1, 2), dropped_MNI)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).view(x_MNI.shape)
            if kept_MNI is None:
                grad_x.baddbmm_(grad_low_MNR, A_MRI)
            else:
                grad_x.addcmul_(torch.bmm(grad_low_MNR, A_MRI), kept_MNI)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_A_MRI, grad_B_MOR, None, None
