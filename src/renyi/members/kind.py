"""What a member is: the interface of a kind of member, and the registry of kinds.

A kind is one class derived from `MemberLayer`, in one file (`point.py` is the first and the simplest). The joint layer
(`layer.py`) asks it for matrices, `stack.py` handles the members of all layers together, and nothing else in the
project knows what a member consists of.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from renyi.errors import ConfigError


class Noise(NamedTuple):
    """Where random members get their random numbers from in one training step.

    Every forward of the step sees the same noise: the one that scores pairs, the one that trains them, and the one that
    gradient checkpointing repeats. So noise is a function of these numbers and is never kept.

    Attributes:
        seed: of the step.
        draws: S, how many draws of each member the step runs; rows are then those of M·S members.
    """

    seed: int
    draws: int = 1

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        """A generator that starts alike whenever a layer asks for one in this step."""
        return torch.Generator(device).manual_seed((self.seed * 1_000_003 + layer) % 2**63)


class MemberLayer(nn.Module):
    """The M members of one adapted layer, from I to O features at rank R.

    Every parameter and buffer of a kind has the members on its first dimension, [M, …]. Growing, shrinking, splitting
    over processes, copying and clipping rely on that and need nothing from a kind. A kind sets `kind` and defines
    `drawn`, `mean` and `divergence`. The rest has defaults, which suit a kind whose mean is held in parameters
    `lora_A` [M, R, I] and `lora_B` [M, O, R].

    Attributes:
        kind: the name in `ensemble.json` and in the key `member_kind`.
        number: of the layer, counted through the model; it tells the noise of layers apart.
    """

    kind: ClassVar[str]
    number: int = 0

    @classmethod
    def drawn(cls, A_MRI: Tensor, B_MOR: Tensor) -> Self:
        """Fresh members around the matrices that PEFT draws for M adapters (its B is 0)."""
        raise NotImplementedError

    def mean(self) -> tuple[Tensor, Tensor]:
        """Each member's own adapter, A [M, R, I] and B [M, O, R]: what is scored, merged and written for PEFT."""
        held: Any = self  # `functional_call` may have put plain tensors in the places of parameters
        return held.lora_A, held.lora_B

    def matrices(self, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """What a forward multiplies by: A [M·S, R, I] and B [M·S, O, R], member by member; the mean without noise."""
        return self.mean()

    def project(self, x_GNI: Tensor, A_GRI: Tensor, rows: Any) -> Tensor:
        """A x [G, N, R] for N rows of each of G members (or of G rows that see one member each).

        A kind whose rows see noise of their own (flipout) redefines this. `rows` is the `MemberSelection`: its `noise`,
        and which members and examples the rows are of.
        """
        return torch.bmm(x_GNI, A_GRI.transpose(1, 2))

    def divergence(self, origin: Mapping[str, Tensor], prior_std: float) -> Tensor:
        """KL from the prior of width σ around where each member began, nats [M].

        Args:
            origin: the layer's tensors as they were then, by name.
            prior_std: σ, of every entry.
        """
        raise NotImplementedError

    def kept(self, place: int) -> dict[str, Tensor]:
        """What one member's folder keeps beside the PEFT adapter of its mean, by name."""
        return {name: tensor[place] for name, tensor in self.state_dict().items() if name not in ("lora_A", "lora_B")}

    @torch.no_grad()
    def read(self, place: int, A: Tensor, B: Tensor, kept: Mapping[str, Tensor]) -> None:
        """Become at one place what `mean` and `kept` gave: A [R, I], B [O, R]."""
        tensors = self.state_dict()
        for name, value in {"lora_A": A, "lora_B": B, **{x: kept[x] for x in self.kept(place)}}.items():
            tensors[name][place].copy_(value)


KINDS: dict[str, str | type[MemberLayer]] = {"point": "renyi.members.point"}


def register(kind: type[MemberLayer]) -> type[MemberLayer]:
    """Make a kind known by its name; a decorator. A kind in this package has its module in `KINDS` instead."""
    KINDS[kind.kind] = kind
    return kind


def kind_of(name: str) -> type[MemberLayer]:
    """The kind of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        raise ConfigError(f"{name!r} is no kind of member", where="member_kind", hint=f"Known: {', '.join(KINDS)}.")
    if isinstance(module := KINDS[name], str):
        import_module(module)  # it registers itself
    found = KINDS[name]
    assert not isinstance(found, str)
    return found
