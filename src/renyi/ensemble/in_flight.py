"""One forward over the new tokens of all sequences in flight, each with a KV cache of its own.

`decode.py` decodes prompts that begin together. A server's requests begin and end at any time and have different
lengths. Here a forward reads any number of new tokens of each: a chunk of one's prompt, the last token of another. The
new tokens are packed into one row, member after member, so layers see them as the joint forward's rows and the base is
read once. Only attention looks at each sequence by itself, with its own keys and values, and without any padding.

transformers' models call attention by a name in their config; here the name is that of a function of ours, which calls
the model's own attention function once for each sequence. Read next: `renyi.serve.batching`, which decides what runs in
a step.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from renyi.ensemble.attention import NAME
from renyi.ensemble.ensemble import LoraEnsemble
from renyi.errors import ConfigError, first_line

_NAME = "renyi_in_flight"
_BLOCK = 64  # tokens by which a cache grows at least
_KINDS = {"full_attention", "sliding_attention"}
_SDPA = ("sdpa", NAME)
_ATTENTION = (*_SDPA, "eager", "flash_attention_2", "flash_attention_3")
# Relative to the largest logit. Rounding in half precision stays below; a wrong mask, position or cache does not.
_TOLERANCE = 0.05


class Flight:
    """A sequence in flight: what has been read of it, as keys and values [K, H, L, D] of every layer.

    Attributes:
        member: the only member that reads it, or None for all M. K is 1 or M.
        keeps_all: whether to get the logits after each new token, and not after the last one alone.
        length: L, the number of tokens that have been read.
    """

    def __init__(self, member: int | None = None, keeps_all: bool = False):
        self.member, self.keeps_all, self.length = member, keeps_all, 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, key_KHtD: Tensor, value_KHtD: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens in one layer, and return those of all tokens so far."""
        length = self.length + key_KHtD.shape[2]
        kept = self._kept.get(layer)
        if kept is None or kept[0].shape[2] < length:
            kept = self._kept[layer] = self._grown(kept, key_KHtD, value_KHtD, length)
        for buffer, new in zip(kept, (key_KHtD, value_KHtD), strict=True):
            buffer[:, :, self.length : length] = new
        return kept[0][:, :, :length], kept[1][:, :, :length]

    def _grown(
        self, kept: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        capacity = max(length + _BLOCK, 2 * kept[0].shape[2] if kept else 0)
        grown = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (key, value))
        for old, new in zip(kept or (), grown, strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        return grown[0], grown[1]


class _Part(NamedTuple):
    """Where a sequence's new tokens are in the packed row: in these blocks of members, from `start` to `stop`."""

    flight: Flight
    blocks: slice
    start: int
    stop: int


class _Packed(NamedTuple):
    """The packed row of a forward: `num_blocks` members of `width` tokens."""

    parts: list[_Part]
    num_blocks: int
    width: int
    attention: str
    sliding: set[int]


_packed: ContextVar[_Packed] = ContextVar("packed")


class InFlight:
    """Runs the new tokens of sequences in flight through an ensemble.

    Args:
        ensemble: on this process alone. Run the forwards in its `inference()`, as `generate` does.

    Raises:
        ConfigError: this kind of model cannot be run so. That is tried, not assumed: two sequences of different
            lengths, one read in chunks, must get the logits of the model's own forward.
    """

    def __init__(self, ensemble: LoraEnsemble):
        self.ensemble = ensemble
        self._base: Any = ensemble.base
        self._config = ensemble.base.config
        self._attention = self._config._attn_implementation
        kinds = set(getattr(self._config.get_text_config(), "layer_types", None) or _KINDS)
        if self._attention not in _ATTENTION or kinds - _KINDS:
            other = f"layers of {', '.join(sorted(map(str, kinds - _KINDS)))}" if kinds - _KINDS else self._attention
            raise self._unfit(f"it has {other}")
        AttentionInterface.register(_NAME, _attend)
        with ensemble.inference():
            self._check()

    @torch.inference_mode()
    def __call__(self, work: Sequence[tuple[Flight, Sequence[int]]]) -> list[Tensor]:
        """Read new tokens of some sequences; each occurs once.

        Returns:
            For each sequence the logits [K, N, V] after its last new token, or after each, as the model gives them.
        """
        return self._run(work, set())

    def _run(self, work: Sequence[tuple[Flight, Sequence[int]]], sliding: set[int]) -> list[Tensor]:
        members, parts, width = _layout(work, self.ensemble.num_members)
        ids, positions = (torch.zeros(len(members), width, dtype=torch.long) for _ in range(2))
        kept: list[int] = []
        for (flight, new), part in zip(work, parts, strict=True):
            at = part.blocks, slice(part.start, part.stop)
            ids[at] = torch.tensor(new)
            positions[at] = torch.arange(flight.length, flight.length + len(new))
            asked = range(part.start if flight.keeps_all else part.stop - 1, part.stop)
            kept += [block * width + place for block in range(len(members))[part.blocks] for place in asked]
        device = self._base.device
        packed = _Packed(parts, len(members), width, self._attention, sliding)
        is_all = len(members) == self.ensemble.num_members  # then no matrices need be picked out
        with nullcontext() if is_all else self.ensemble.using(members), self._attending(packed):
            logits = self._base(
                input_ids=ids.view(1, -1).to(device),
                position_ids=positions.view(1, -1).to(device),
                use_cache=False,
                logits_to_keep=torch.tensor(kept, device=device),
            ).logits[0]
        for flight, new in work:
            flight.length += len(new)
        blocks = [len(range(len(members))[part.blocks]) for part in parts]
        several = [len(new) if flight.keeps_all else 1 for flight, new in work]
        rows = logits.split([k * n for k, n in zip(blocks, several, strict=True)])
        return [own.view(k, -1, own.shape[-1]) for own, k in zip(rows, blocks, strict=True)]

    @contextmanager
    def _attending(self, packed: _Packed) -> Iterator[None]:
        token = _packed.set(packed)
        self._config._attn_implementation = _NAME
        try:
            yield
        finally:
            self._config._attn_implementation = self._attention
            _packed.reset(token)

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare with the model's own forward, on two sequences of which one is for a single member."""
        vocabulary = self._base.get_input_embeddings().weight.shape[0]
        ids = [(37 * i + 11) % vocabulary for i in range(13)]
        member = self.ensemble.num_members - 1
        sliding: set[int] = set()
        everyone, alone = Flight(), Flight(member)
        try:
            self._run([(everyone, ids[:4])], sliding)
            self._run([(everyone, ids[4:9]), (alone, ids[:5])], sliding)
            found = self._run([(everyone, ids[9:10]), (alone, ids[5:6])], sliding)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise self._unfit(f"it fails with {type(error).__name__}: {first_line(error)}") from error
        own = self.ensemble.logits(torch.tensor([ids[:10]], device=self._base.device))
        for logits_K1V, own_KV in zip(found, (own[:, 0, 9], own[member:, 0, 5]), strict=True):
            off = (logits_K1V[:, 0].float() - own_KV.float()).abs().amax() / own_KV.float().abs().amax()
            if not off <= _TOLERANCE:
                raise self._unfit(f"its logits would be wrong by {float(off):.2g} of the largest")
        kinds = getattr(self._config.get_text_config(), "layer_types", None) or ()
        if list(kinds).count("sliding_attention") > len(sliding):
            raise self._unfit("its layers do not say how wide the window of their attention is")

    def _unfit(self, why: str) -> ConfigError:
        return ConfigError(
            f"{type(self._base).__name__} cannot answer several requests at once here: {why}",
            where="serve",
            hint="Load the base with attn_implementation sdpa or eager, or export the members for another server.",
        )


def _layout(work: Sequence[tuple[Flight, Sequence[int]]], num_members: int) -> tuple[list[int], list[_Part], int]:
    """The members whose blocks a forward needs, the place of each sequence, and the width of a block.

    Sequences that all members read come first, at the same place in every block. Those of one member follow in its
    block; blocks of other members are padded, so that sequences of different members share the width. All blocks are
    padded to a rounded width.
    """
    shared = sum(len(new) for flight, new in work if flight.member is None)
    lone = sorted({flight.member for flight, _ in work if flight.member is not None})
    members = list(range(num_members)) if shared else lone
    ends = dict.fromkeys(members, shared)
    parts: list[_Part] = []
    start = 0
    for flight, new in work:
        if flight.member is None:
            parts.append(_Part(flight, slice(None), start, start := start + len(new)))
        else:
            block, begin = members.index(flight.member), ends[flight.member]
            ends[flight.member] = begin + len(new)
            parts.append(_Part(flight, slice(block, block + 1), begin, begin + len(new)))
    return members, parts, _rounded(max(ends.values()))


def _rounded(width: int) -> int:
    """The next width of 8 for each power of two, at most an eighth more.

    A CPU's matrix products are prepared for each number of rows and kept. With all numbers that requests make, a server
    would grow for hours.
    """
    step = 1 << max(0, width.bit_length() - 4)
    return -(-width // step) * step


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row [1, H, M·N, D], sequence by sequence, as transformers' models call it."""
    packed, layer = _packed.get(), int(module.layer_idx)  # type: ignore[arg-type]
    own = _own_attention(module, packed.attention)
    if sliding_window is not None:
        packed.sliding.add(layer)

    def blocks(x: Tensor) -> Tensor:
        """[M, H, N, D]."""
        return x[0].unflatten(1, (packed.num_blocks, packed.width)).transpose(0, 1)

    query, key, value = blocks(query), blocks(key), blocks(value)
    result: Tensor | None = None
    for part in packed.parts:
        at = part.blocks, slice(None), slice(part.start, part.stop)
        keys, values = part.flight.add(layer, key[at], value[at])
        if part.stop - part.start == 1 and sliding_window is not None:
            keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
        asking = query[at]
        if packed.attention in _SDPA and asking.shape[2] == 1:
            # Heads that share a key become queries of it. In bfloat16 a CPU is four times as fast so.
            asking = asking.unflatten(1, (keys.shape[1], -1)).squeeze(3)
            found, _ = own(module, asking, keys, values, None, is_causal=False, **kwargs)
            found = found.transpose(1, 2).flatten(1, 2)[:, None]
        else:
            mask = _mask(part.stop - part.start, keys, sliding_window, packed.attention)
            found, _ = own(module, asking, keys, values, mask, sliding_window=sliding_window, **kwargs)
        if result is None:
            if len(packed.parts) == 1 and found.shape[:2] == (packed.num_blocks, packed.width):
                result = found
                break
            result = found.new_zeros(packed.num_blocks, packed.width, *found.shape[2:])
        result[part.blocks, part.start : part.stop] = found
    assert result is not None
    return result.reshape(1, -1, *result.shape[2:]), None


def _own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """The function that the model calls by itself. "eager" is the one in the file of the layer."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface().get_interface(name, _attend)


def _mask(new: int, keys: Tensor, sliding_window: int | None, attention: str) -> Tensor | None:
    """Which of the keys [K, H, L, D] each of the last `new` tokens may see; None where the function knows by itself."""
    length = keys.shape[2]
    if new == 1 or attention.startswith("flash"):
        return None
    if attention in _SDPA and new == length and (sliding_window is None or length <= sliding_window):
        return None
    behind = torch.arange(length - new, length, device=keys.device)[:, None] - torch.arange(length, device=keys.device)
    seen = behind >= 0
    if sliding_window is not None:
        seen &= behind < sliding_window
    if attention in _SDPA:
        return seen[None, None]
    return torch.zeros_like(seen, dtype=keys.dtype).masked_fill(~seen, torch.finfo(keys.dtype).min)[None, None]
