"""The members of an ensemble in all layers together: read, copied, added, removed, and replaced for a while.

This works for every kind of member, because every tensor of a kind has the members on its first dimension (`kind.py`).
Read next: `adapters.py`, the members as PEFT adapters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from renyi.errors import EnsembleFormatError
from renyi.members.adapters import Adapter, joint_layers
from renyi.members.head import HEAD_NAME, MemberHead
from renyi.members.kind import Noise
from renyi.members.layer import MemberSelection

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # (A, B) by layer name


class MemberStack:
    """The members that this process holds.

    Attributes:
        layers: the joint layers by name, in the model's order.
        head: the members' reward heads; None for members of a language model.
        selection: the members that the rows of the next forward see.
    """

    def __init__(self, model: nn.Module, selection: MemberSelection):
        self.layers, self.selection = joint_layers(model), selection
        head = getattr(model, HEAD_NAME, None)
        self.head = head if isinstance(head, MemberHead) else None

    @property
    def kind(self) -> str:
        """The members' kind; "point" inside `acting_as`."""
        return "point" if self.is_acting else next(iter(self.layers.values())).members.kind

    @property
    def is_acting(self) -> bool:
        """Whether forwards run with the matrices that were given to `acting_as`."""
        return next(iter(self.layers.values())).acting is not None

    @property
    def is_random(self) -> bool:
        """Whether `redraw` changes anything."""
        return next(iter(self.layers.values())).members.is_random

    @property
    def spread_names(self) -> tuple[str, ...]:
        """The names of the parameters that say how wide the members are, in each layer; empty for points."""
        return next(iter(self.layers.values())).members.spreads

    @property
    def has_zero_std(self) -> bool:
        """Whether a member has no spread at all, so that its KL divergence from a prior is infinite."""
        return any(
            bool((getattr(layer.members, name) == -torch.inf).any())
            for layer in self.layers.values()
            for name in self.spread_names
        )

    def set_std(self, std: float) -> None:
        """Give the entries of every A the standard deviation `std`; points have none."""
        for layer in self.layers.values():
            layer.members.set_std(std)

    def parameters(self) -> list[nn.Parameter]:
        heads = [] if self.head is None else [self.head.weight]
        return [p for layer in self.layers.values() for p in layer.members.parameters()] + heads

    @contextmanager
    def casting(self, precision: torch.dtype | None) -> Iterator[None]:
        """Keep the frozen linear layers in the precision that training multiplies in, for all forwards inside.

        They do not change, so they are cast once and not in every step. None keeps nothing. Layers whose weights are
        split over processes are left out.
        """
        layers = [layer for layer in self.layers.values() if precision and type(layer.base_layer) is nn.Linear]
        try:
            for layer in layers:
                frozen: Any = layer.base_layer
                weight, bias = frozen.weight, frozen.bias
                if weight.dtype != precision and not isinstance(weight, DTensor):
                    layer.cast = weight.detach().to(precision), None if bias is None else bias.detach().to(precision)
            yield
        finally:
            for layer in layers:
                layer.cast = None

    def names(self) -> set[str]:
        """The names of the members' tensors in the base's state dict. All other names are the base's own tensors."""
        heads = set() if self.head is None else {f"{HEAD_NAME}.weight"}
        return heads | {
            f"{name}.members.{x}" for name, layer in self.layers.items() for x in layer.members.state_dict()
        }

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each layer's A [M, R, I] and B [M, O, R]: the members' means, or the matrices given to `acting_as`."""
        return {n: layer.members.mean() if layer.acting is None else layer.acting for n, layer in self.layers.items()}

    @property
    def is_fresh(self) -> bool:
        """Whether no member has been trained: every B is zero, so all members are equal to the base."""
        return not any(bool(B.any()) for _, B in self.matrices().values())

    def redraw(self, seed: int | None, draws: int = 1) -> None:
        """Draw the random parts of members anew. They stay the same in every forward until the next call.

        Args:
            seed: of the noise; None to use the means instead.
            draws: S, the number of draws of each member.
        """
        self.selection.noise = None if seed is None else Noise(seed, draws)

    @contextmanager
    def acting_as(
        self, matrices: Iterable[tuple[Tensor, Tensor]], precision: torch.dtype | None = None
    ) -> Iterator[None]:
        """Run forwards with the given matrices of each layer instead of the members' own.

        Args:
            matrices: each layer's A [K, R, I] and B [K, O, R].
            precision: that of a half-precision base, to round them to where it saves time; see `JointLayer.rounded`.
        """
        layers = list(self.layers.values())
        before, noise = [(layer.acting, layer.rounded) for layer in layers], self.selection.noise
        self.selection.noise = None
        for layer, (A_KRI, B_KOR) in zip(layers, matrices, strict=True):
            layer.acting = A_KRI, B_KOR
            layer.rounded = None if precision is None else (A_KRI.to(precision), B_KOR.to(precision))
        try:
            yield
        finally:
            self.selection.noise = noise
            for layer, (acting, rounded) in zip(layers, before, strict=True):
                layer.acting, layer.rounded = acting, rounded

    def prior(self, std: float) -> Callable[[], Tensor]:
        """A function that returns the members' divergences from a prior, nats [M].

        The prior is centred on the members as they are now.

        Args:
            std: the prior's width σ.
        """
        layers = [layer.members for layer in self.layers.values()]
        origins = [{n: p.detach().clone() for n, p in layer.state_dict(keep_vars=True).items()} for layer in layers]

        def divergence() -> Tensor:
            parts = [layer.divergence(origin, std) for layer, origin in zip(layers, origins, strict=True)]
            return torch.stack([part.to(parts[0].device) for part in parts]).sum(dim=0)

        return divergence

    @torch.no_grad()
    def keep(self, places: list[int]) -> None:
        """Keep only the members at these places, in this order. A place that is given twice becomes two members."""
        for layer in self.layers.values():
            for module in layer.members.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter[places].clone(), parameter.requires_grad))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, buffer[places].clone())
        if self.head is not None:
            self.head.weight = nn.Parameter(self.head.weight[places].clone(), self.head.weight.requires_grad)

    def adapters(self, config: LoraConfig, gathered: Callable[[Tensor], Tensor]) -> Callable[[int], Adapter]:
        """Gather the tensors of all members, and return a function from a member's index to its `Adapter`.

        Args:
            config: the LoRA config of all adapters.
            gathered: from a tensor of this process's members to a tensor of all members. Only the process that writes
                files needs all members.
        """
        means = {n: (gathered(A), gathered(B)) for n, (A, B) in self.matrices().items()}
        kept: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            if layer.acting is None:
                places = [layer.members.kept(place) for place in range(len(layer.members.mean()[1]))]
                kept[name] = {x: gathered(torch.stack([of[x] for of in places])) for x in places[0]}

        heads_M1D = None if self.head is None else gathered(self.head.weight.detach())

        def adapter(member: int) -> Adapter:
            of_layers = {layer: {x: t[member] for x, t in of.items()} for layer, of in kept.items()}
            head = None if heads_M1D is None else heads_M1D[member]
            return Adapter(config, {n: (A[member], B[member]) for n, (A, B) in means.items()}, of_layers, head)

        return adapter

    def read(self, place: int, adapter: Adapter, where: str) -> None:
        """Fill one place with a member that was read from a folder.

        Raises:
            EnsembleFormatError: its layers or shapes are not those of the base, or a tensor is missing.
        """
        self.check(adapter.weights, where)
        if self.head is not None:
            self.head.read(place, adapter.head, where)
        for name, layer in self.layers.items():
            missing = sorted(layer.members.kept(place).keys() - adapter.kept.get(name, {}).keys())
            if missing:
                raise EnsembleFormatError(
                    f"there is no {missing[0]} of {name}", where=where, hint=f"A member here is {self.kind}."
                )
            layer.members.read(place, *adapter.weights[name], adapter.kept.get(name, {}))

    def check(self, weights: Matrices, where: str) -> None:
        """Raise `EnsembleFormatError` unless a member's matrices have the layers and shapes of this base."""
        if self.layers.keys() != weights.keys():
            odd = sorted(self.layers.keys() ^ weights.keys())
            raise EnsembleFormatError(
                f"adapts other layers than the other members or this base (for example {odd[0]})",
                where=where,
                hint="Members of one ensemble share their base model and their target modules.",
            )
        for name, layer in self.layers.items():
            for stacked, weight in zip(layer.members.mean(), weights[name], strict=True):
                if stacked.shape[1:] != weight.shape:
                    raise EnsembleFormatError(
                        f"{name} has shape {tuple(weight.shape)} where {tuple(stacked.shape[1:])} is needed",
                        where=where,
                        hint="Members of one ensemble share their rank and their base model.",
                    )
