"""Which groups of requests may run: whole ones, and only where a group fits into one step and stays to its end.

A group's requests arrive one by one and wait until all are there. A group begins when its prompts fit into one step,
its rows into the batch, and its longest answer into the KV cache beside those of all who run already. So vLLM never
has to put off or preempt a part of a group. A request that belongs to no group is admitted by the same rules.

It knows numbers, and nothing of vLLM. Read next: `scheduler.py`, which vLLM calls.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from renyi.vllm.groups import Membership


@dataclass(frozen=True)
class Room:
    """What a server can hold.

    Attributes:
        rows: requests in a batch.
        step_tokens: tokens that a step reads.
        blocks: blocks of the KV cache.
        adapters: different adapters in a batch.
    """

    rows: int
    step_tokens: int
    blocks: int
    adapters: int


@dataclass(frozen=True)
class Need:
    """What a request needs: prompt tokens in its first step, blocks at its end, and its adapter (None: the base)."""

    prompt: int
    blocks: int
    adapter: Hashable = None


@dataclass
class Group:
    """Requests that begin together.

    Attributes:
        name: of the group.
        size: how many requests it has when it is whole.
        like: what is equal for all of them.
        requests: vLLM's requests, by member.
        needs: what each needs, by member.
        names: of those requests that have not ended.
    """

    name: str
    size: int
    like: Any
    requests: dict[int, Any] = field(default_factory=dict)
    needs: dict[int, Need] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def add(self, member: int, name: str, request: Any, need: Need) -> None:
        self.requests[member], self.needs[member] = request, need
        self.names.append(name)

    @property
    def is_whole(self) -> bool:
        return len(self.requests) == self.size

    @property
    def prompt(self) -> int:
        return sum(need.prompt for need in self.needs.values())

    @property
    def blocks(self) -> int:
        return sum(need.blocks for need in self.needs.values())

    @property
    def adapters(self) -> set[Hashable]:
        return {need.adapter for need in self.needs.values()} - {None}


class Admission:
    """Groups that arrive, that wait and that run."""

    def __init__(self, room: Room):
        self.room = room
        self._groups: dict[str, Group] = {}
        self._waiting: deque[Group] = deque()
        self._running: dict[str, Group] = {}
        self._group_of: dict[str, Group] = {}  # by the name of a request

    def add(self, name: str, request: Any, membership: Membership | None, need: Need, like: Any = None) -> str | None:
        """Take a request.

        Args:
            name: of the request.
            request: vLLM's.
            membership: its place in its group; None if it belongs to none.
            need: what it needs.
            like: what must be equal for all requests of a group: prompt, settings, seed.

        Returns:
            Why its group can never run; None if it can. `others` names the requests that have to end as well.
        """
        group_name = name if membership is None else membership.group
        member, size = (0, 1) if membership is None else (membership.member, membership.size)
        group = self._groups.get(group_name) or Group(group_name, size, like)
        if group.is_whole:
            return f"group {group_name} is complete already"
        if member in group.requests or size != group.size:
            return f"group {group_name} of {group.size} cannot take member {member} of {size}"
        if like != group.like:
            return f"the requests of group {group_name} differ in prompt, settings or seed"
        group.add(member, name, request, need)
        self._groups[group_name] = self._group_of[name] = group
        if not group.is_whole:
            return None
        if reason := self._never(group):
            return reason
        self._waiting.append(group)
        return None

    def next(self, running_tokens: int, running_rows: int) -> list[Group]:
        """The groups that begin now, in their order of arrival. None overtakes another.

        Args:
            running_tokens: tokens that the step reads for those who run already.
            running_rows: how many they are.
        """
        begun = []
        tokens, rows = running_tokens, running_rows
        blocks = sum(group.blocks for group in self._running.values())
        adapters = set().union(*(group.adapters for group in self._running.values()))
        while self._waiting:
            group = self._waiting[0]
            tokens, rows, blocks = tokens + group.prompt, rows + group.size, blocks + group.blocks
            adapters |= group.adapters
            room = self.room
            if tokens > room.step_tokens or rows > room.rows or blocks > room.blocks or len(adapters) > room.adapters:
                break
            self._waiting.popleft()
            self._running[group.name] = group
            begun.append(group)
        return begun

    def others(self, name: str) -> list[str]:
        """All requests of the group to which this request belongs and that have not ended, this one included."""
        group = self._group_of.get(name)
        return [] if group is None else list(group.names)

    def forget(self, names: Iterable[str]) -> None:
        """These requests have ended. What a group holds is free when all of its requests have ended."""
        for name in names:
            group = self._group_of.pop(name, None)
            if group is None:
                continue
            group.names.remove(name)
            if not group.names:
                self._groups.pop(group.name, None)
                self._running.pop(group.name, None)
                if group in self._waiting:
                    self._waiting.remove(group)

    @property
    def running(self) -> list[Group]:
        return list(self._running.values())

    @property
    def num_waiting(self) -> int:
        """Requests that are complete groups and wait."""
        return sum(group.size for group in self._waiting)

    def _never(self, group: Group) -> str | None:
        """Why a group cannot run even when nothing else does."""
        room = self.room
        for needed, most, what, option in (
            (group.size, room.rows, "rows", "--max-num-seqs"),
            (group.prompt, room.step_tokens, "prompt tokens in one step", "--max-num-batched-tokens"),
            (group.blocks, room.blocks, "blocks of the KV cache", "--kv-cache-memory-bytes"),
            (len(group.adapters), room.adapters, "adapters", "--max-loras"),
        ):
            if needed > most:
                return f"group {group.name} needs {needed:,} {what}, and the server has {most:,}: raise {option}"
        return None
