"""The mixture inside a batch of vLLM: brings a group's rows together and writes log p̄ to all of them.

It follows the batch as vLLM's `LogitsProcessor` is told of it: rows are added, moved and removed. It writes to the rows
of whole groups only. A group that was ever seen in part, or whose rows hold different tokens, is broken until its rows
are gone; its rows keep their own members' logits, and `renyi.vllm.scheduler` ends its requests.

It knows tensors and lists, and nothing of vLLM. Read next: `processor.py`, which vLLM calls.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.measures import token_uncertainty
from renyi.objectives import mixture_log_probs, mixture_logits, running_log_weights
from renyi.vllm.groups import Membership

# (index, membership or None, output tokens so far: a list that grows)
AddedRow = tuple[int, Membership | None, list[int]]
# (from, to, whether they change places)
MovedRow = tuple[int, int, bool]
# Tokens with their log-probabilities, likeliest first
Likeliest = Sequence[tuple[int, float]]


class Record(NamedTuple):
    """What a step knew of a group's next token, before the token was chosen. Uncertainties are in nats.

    Attributes:
        group: its name.
        position: how many tokens the answer had.
        weights: running weights of the members, [M].
        total, aleatoric, epistemic, variation_ratio: as in `renyi.measures.TokenUncertainty`.
        alternatives: the mixture's likeliest tokens with their log-probabilities, likeliest first.
        member_alternatives: [M], the same of each member; empty unless asked for.
        broken: why there is no mixture; None if there is one.
    """

    group: str
    position: int
    weights: Sequence[float] = ()
    total: float = 0.0
    aleatoric: float = 0.0
    epistemic: float = 0.0
    variation_ratio: float = 0.0
    alternatives: Likeliest = ()
    member_alternatives: Sequence[Likeliest] = ()
    broken: str | None = None


class _Row(NamedTuple):
    membership: Membership
    output: list[int]


class _Group:
    """The state of a group between steps."""

    def __init__(self, membership: Membership):
        self.weights, self.mixture = membership.weights, membership.mixture
        self.alternatives, self.members = membership.alternatives, membership.members
        self.output: list[int] = []
        self.log_w: Tensor | None = None  # [M] float64
        self.log_p: Tensor | None = None  # [M, V], the members' distributions of the token after `output`
        self.broken: str | None = None

    def flaw(self, rows: Sequence[_Row]) -> str | None:
        """Why these rows are no whole group; None if they are."""
        if any(row.membership.weights != self.weights or row.membership.mixture != self.mixture for row in rows):
            return "its requests give different weights or kinds of mixture"
        there = sorted(row.membership.member for row in rows)
        if there != list(range(len(self.weights))):
            return f"a step held members {there} of {len(self.weights)}"
        output = rows[0].output
        if any(row.output != output for row in rows):
            return "its members hold different tokens"
        if output[: len(self.output)] != self.output or len(output) > len(self.output) + 1:
            return f"it went on from {len(self.output)} to {len(output)} tokens out of sight"
        if output and output[-1] < 0:
            return "vLLM did not say yet which token was chosen; it needs --no-async-scheduling"
        if len(output) > len(self.output) and self.log_p is None:
            return "it joined the batch with an answer begun"
        return None


class Mixing:
    """Follows a batch and mixes its groups.

    Args:
        tell: is called with the records of each step, where someone wants them.
    """

    def __init__(self, tell: Callable[[list[Record]], None] | None = None):
        self._tell = tell
        self._rows: dict[int, _Row] = {}
        self._groups: dict[str, _Group] = {}

    def update(self, removed: Iterable[int], added: Iterable[AddedRow], moved: Iterable[MovedRow]) -> None:
        """Follow a change of the batch, in vLLM's order: rows removed, then added, then moved."""
        for index in removed:
            self._rows.pop(index, None)
        for index, membership, output in added:
            self._rows.pop(index, None)
            if membership is not None:
                self._rows[index] = _Row(membership, output)
        for start, end, is_swap in moved:
            first, second = self._rows.pop(start, None), self._rows.pop(end, None)
            if first is not None:
                self._rows[end] = first
            if second is not None and is_swap:
                self._rows[start] = second
        present = {row.membership.group: row.membership for row in self._rows.values()}
        self._groups = {name: self._groups.get(name) or _Group(membership) for name, membership in present.items()}

    @torch.no_grad()
    def apply(self, logits_RV: Tensor) -> Tensor:
        """Write the mixture to the rows of whole groups, in place, and return the same tensor.

        Args:
            logits_RV: logits of all rows of the batch, float32.
        """
        if not self._rows:
            return logits_RV
        rows_of: dict[str, list[int]] = defaultdict(list)
        for index, row in self._rows.items():
            rows_of[row.membership.group].append(index)
        records: list[Record] = []
        whole: dict[int, list[tuple[str, _Group, list[int]]]] = defaultdict(list)
        for name, indices in rows_of.items():
            group = self._groups[name]
            rows = [self._rows[index] for index in indices]
            if group.broken is None:
                group.broken = group.flaw(rows)
            if group.broken is not None:
                group.log_p = None
                records += [Record(name, len(rows[0].output), broken=group.broken)]
                continue
            self._advance(group, rows[0].output)
            indices = sorted(indices, key=lambda index: self._rows[index].membership.member)
            whole[len(indices)].append((name, group, indices))
        for size, groups in whole.items():
            records += self._mix(logits_RV, size, groups)
        if self._tell is not None and records:
            self._tell(records)
        return logits_RV

    def _advance(self, group: _Group, output: list[int]) -> None:
        """Count the token that was chosen after the last step, if there is one, in the running weights."""
        if len(output) > len(group.output):
            assert group.log_p is not None
            assert group.log_w is not None
            if group.mixture == "sequence":
                group.log_w = running_log_weights(group.log_w, group.log_p[:, output[-1]].double())
            group.output.append(output[-1])
        group.log_p = None

    def _mix(self, logits_RV: Tensor, size: int, groups: list[tuple[str, _Group, list[int]]]) -> list[Record]:
        """Mix G groups of the same size M."""
        index_MG = torch.tensor([indices for _, _, indices in groups], device=logits_RV.device).T
        logits_MGV = logits_RV[index_MG].float()
        log_p_MGV = logits_MGV.log_softmax(-1)
        for _, group, _ in groups:
            if group.log_w is None:
                weights = torch.tensor(group.weights, dtype=torch.float64, device=logits_RV.device)
                group.log_w = weights.log().log_softmax(0)
        log_w_MG = torch.stack([group.log_w for _, group, _ in groups if group.log_w is not None], dim=1)
        mixed_GV = mixture_logits(logits_MGV, log_p_MGV, log_w_MG)
        is_number_G = ~log_p_MGV[..., 0].isnan().any(0)
        records = self._records(groups, log_p_MGV, log_w_MG, is_number_G.tolist())
        for at, (_, group, _) in enumerate(groups):
            if group.broken is None:
                group.log_p = log_p_MGV[:, at]
                logits_RV[index_MG[:, at]] = mixed_GV[at].to(logits_RV.dtype)
        return records

    def _records(
        self,
        groups: list[tuple[str, _Group, list[int]]],
        log_p_MGV: Tensor,
        log_w_MG: Tensor,
        is_number_G: list[bool],
    ) -> list[Record]:
        """A record for each group. A group whose logits are not numbers becomes broken."""
        for (_, group, _), is_number in zip(groups, is_number_G, strict=True):
            if not is_number:
                group.broken = "a member's logits are not numbers"
        if self._tell is None:
            return []
        of = token_uncertainty(log_p_MGV, log_w_MG)
        numbers_4G = torch.stack([of.total, of.aleatoric, of.epistemic, of.variation_ratio]).tolist()
        weights_GM = log_w_MG.exp().T.tolist()
        records = []
        for at, (name, group, _) in enumerate(groups):
            position = len(group.output)
            if group.broken is not None:
                records.append(Record(name, position, broken=group.broken))
                continue
            several = group.alternatives
            mixed: Likeliest = ()
            each: Sequence[Likeliest] = ()
            if several:
                (mixed,) = _likeliest(mixture_log_probs(log_p_MGV[:, at], log_w_MG[:, at])[None], several)
            if several and group.members:
                each = _likeliest(log_p_MGV[:, at], several)
            total, aleatoric, epistemic, variation_ratio = (values[at] for values in numbers_4G)
            records.append(
                Record(name, position, weights_GM[at], total, aleatoric, epistemic, variation_ratio, mixed, each)
            )
        return records


def _likeliest(log_p_RV: Tensor, several: int) -> list[Likeliest]:
    top = log_p_RV.topk(min(several, log_p_RV.shape[-1]), dim=-1)
    return [
        list(zip(tokens, values, strict=True))
        for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
