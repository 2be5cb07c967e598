"""The interface of a kind of member, and the registry of kinds.

A kind is one class in one file, derived from `MemberLayer`. All other code uses members through this interface, so a
new kind needs no change elsewhere but its line in `KINDS`.

Read next: `point.py`, the simplest kind; `layer.py`, which asks a kind for matrices; and `stack.py`, which handles the
members of all layers together.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from renyi.errors import ConfigError

# Constants of splitmix64 as signed 64-bit numbers. Products wrap around.
_ODD = (-4658895280553007687, -7723592293110705685, -7046029254386353131)


class Noise(NamedTuple):
    """The source of random numbers for random members in one training step.

    Every forward of the step must see the same noise: the forward that scores, the forward that trains, and the one
    that gradient checkpointing repeats. So the noise is computed from these numbers each time and is never stored.

    Draw s of every member uses the same standard normal numbers. So responsibilities compare members and not their
    noise, and the result of a step depends neither on the order of the members nor on the process that holds them.

    Attributes:
        seed: the seed of the step.
        draws: S, the number of draws of each member in the step. The rows are then those of M·S members.
    """

    seed: int
    draws: int = 1

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        """A generator for one layer. It is in the same state whenever the layer asks for one in this step."""
        return torch.Generator(device).manual_seed(self._key(layer))

    def normal(self, layer: int, *shape: int, like: Tensor) -> Tensor:
        """Standard normal numbers of one layer, the same whenever they are asked for in this step."""
        where = {"device": like.device, "dtype": like.dtype}
        return torch.randn(*shape, generator=self.generator(layer, like.device), **where)  # type: ignore[call-overload]

    def signs(self, layer: int, draws: Tensor, examples: Tensor, number: int) -> Tensor:
        """Random signs: a function of the step, the layer, the draw and the example, and of nothing else.

        A hash makes them (the last steps of splitmix64). A generator would have to run through the whole batch, and
        processes and passes see different parts of it.

        Args:
            layer: number of the layer.
            draws: the draw of each row, int64 [...].
            examples: the place of each row's example in the step, int64 [...].
            number: how many signs each row gets.

        Returns:
            +1 or −1, float32 [..., number].
        """
        place = draws * _ODD[0] + examples * _ODD[1] + self._key(layer)
        x = place[..., None] + torch.arange(1, number + 1, device=place.device) * _ODD[2]
        for shift, factor in ((30, _ODD[0]), (27, _ODD[1])):
            x = (x ^ (x >> shift)) * factor
        return (x ^ (x >> 31)).bitwise_and(1).float() * 2 - 1

    def _key(self, layer: int) -> int:
        return (self.seed * 1_000_003 + layer) % 2**63


class MemberLayer(nn.Module):
    """The M members of one adapted layer, from I to O features at rank R.

    Every parameter and buffer of a kind has the members on its first dimension, [M, …]. Code that adds, removes, copies
    or clips members, or splits them over processes, relies on that and needs nothing else from a kind.

    A kind sets `kind` and defines `drawn` and `divergence`. The other methods have defaults. They suit a kind that
    holds its mean in the parameters `lora_A` [M, R, I] and `lora_B` [M, O, R]; other kinds define `mean` as well.

    Attributes:
        kind: the name in `ensemble.json` and in the key `member_kind`.
        is_random: whether a forward with noise differs from one without.
        spreads: names of the parameters that say how wide a member is. They hold logarithms of standard deviations,
            have a learning rate of their own (`std_learning_rate`) and no weight decay.
        number: the number of the layer in the model. It makes the noise of different layers different.
    """

    kind: ClassVar[str]
    is_random: ClassVar[bool] = True
    spreads: ClassVar[tuple[str, ...]] = ()
    number: int = 0

    @classmethod
    def drawn(cls, A_MRI: Tensor, B_MOR: Tensor) -> Self:
        """Make fresh members from the matrices that PEFT draws for M adapters (PEFT's B is 0)."""
        raise NotImplementedError

    @torch.no_grad()
    def set_std(self, std: float) -> None:
        """Give every entry of A the standard deviation `std`. A kind without spread has nothing to do."""

    def std(self) -> Tensor | None:
        """The standard deviation of each member's entries of A, averaged over the layer: [M]; None without spread."""
        return None

    def mean(self) -> tuple[Tensor, Tensor]:
        """The mean adapter of each member, A [M, R, I] and B [M, O, R]. It is what is scored, merged and saved."""
        held: Any = self  # `functional_call` may have replaced parameters by plain tensors
        return held.lora_A, held.lora_B

    def matrices(self, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """The matrices of a forward: A [M·S, R, I] and B [M·S, O, R], member by member. Without noise, the mean."""
        return self.mean()

    def project(self, x_GNI: Tensor, A_GRI: Tensor, rows: Any) -> Tensor:
        """A x [G, N, R], for N rows of each of G members (or for G rows, each with a member of its own).

        A kind with different noise for each row (flipout) overrides this.

        Args:
            x_GNI: the inputs.
            A_GRI: the matrices A of the members.
            rows: the `MemberSelection`. It holds the noise, and the member and the example of each row.
        """
        return torch.bmm(x_GNI, A_GRI.transpose(1, 2))

    def divergence(self, origin: Mapping[str, Tensor], prior_std: float) -> Tensor:
        """KL divergence of each member from its prior, nats [M]. The prior has width σ around the member's start.

        Args:
            origin: the layer's tensors at the start, by name.
            prior_std: σ, the same for every entry.
        """
        raise NotImplementedError

    def kept(self, place: int) -> dict[str, Tensor]:
        """The tensors of one member that its folder holds beside the PEFT adapter of its mean, by name."""
        return {name: tensor[place] for name, tensor in self.state_dict().items() if name not in ("lora_A", "lora_B")}

    @torch.no_grad()
    def read(self, place: int, A: Tensor, B: Tensor, kept: Mapping[str, Tensor]) -> None:
        """Fill one place with a member that was saved: A [R, I] and B [O, R] from `mean`, the rest from `kept`."""
        tensors = self.state_dict()
        for name, value in {"lora_A": A, "lora_B": B, **{x: kept[x] for x in self.kept(place)}}.items():
            tensors[name][place].copy_(value)


KINDS: dict[str, str | type[MemberLayer]] = {
    name: f"renyi.members.{name}" for name in ("point", "gaussian", "walsh_hadamard", "langevin")
}


def register(kind: type[MemberLayer]) -> type[MemberLayer]:
    """Register a kind by its name; a decorator. Kinds of this package also have their module in `KINDS`."""
    KINDS[kind.kind] = kind
    return kind


def kind_of(name: str) -> type[MemberLayer]:
    """The kind with the given name.

    Raises:
        ConfigError: there is no such kind.
    """
    if name not in KINDS:
        hint = f"Write one of: {', '.join(KINDS)}."
        raise ConfigError(f"{name!r} is not a kind of member", where="member_kind", hint=hint)
    if isinstance(module := KINDS[name], str):
        import_module(module)  # the module registers its kind
    found = KINDS[name]
    assert not isinstance(found, str)
    return found
