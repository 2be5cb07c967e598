"""What a request says about its group: the extra arguments that travel in `vllm_xargs`.

It knows neither vLLM nor HTTP, so the server's engine writes with it what the plugin reads. Read next: `mixing.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from renyi.errors import ConfigError

GROUP, MEMBER, WEIGHTS = "renyi_group", "renyi_member", "renyi_weights"
MIXTURE, ALTERNATIVES, MEMBERS = "renyi_mixture", "renyi_alternatives", "renyi_members"
_KEYS = (GROUP, MEMBER, WEIGHTS, MIXTURE, ALTERNATIVES, MEMBERS)
MIXTURES = ("sequence", "token")
MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class Membership:
    """A request's place in its group of M requests.

    Attributes:
        group: name of the group, the same for its M requests and for no others.
        member: which of them this is, counted from 0.
        weights: mixture weights of the members, [M], the same for all of them; they sum to one.
        mixture: "sequence", with running weights; or "token", in which weights stay as they are.
        alternatives: how many of the mixture's likeliest tokens to record.
        members: whether to record as many of each member.
    """

    group: str
    member: int
    weights: tuple[float, ...]
    mixture: str = "sequence"
    alternatives: int = 0
    members: bool = False

    @property
    def size(self) -> int:
        return len(self.weights)

    def extra_args(self) -> dict[str, str | int | list[float]]:
        """The value of `vllm_xargs` in vLLM's API, of `extra_args` in its sampling parameters."""
        return {
            GROUP: self.group,
            MEMBER: self.member,
            WEIGHTS: list(self.weights),
            MIXTURE: self.mixture,
            ALTERNATIVES: self.alternatives,
            MEMBERS: int(self.members),
        }


def membership_of(extra_args: Mapping[str, Any] | None) -> Membership | None:
    """Read what a request says about its group; None for a request that belongs to none.

    Raises:
        ConfigError: the arguments are incomplete or malformed.
    """
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith("renyi_")}
    if not given:
        return None
    for key in given:
        if key not in _KEYS:
            raise ConfigError("there is no such argument", where=key, hint=f"Known are {', '.join(_KEYS)}.")
    for key in (GROUP, MEMBER, WEIGHTS):
        if key not in given:
            raise ConfigError(f"goes with {key}, which is missing", where=next(iter(given)))
    weights = given[WEIGHTS]
    if not _is_distribution(weights):
        raise ConfigError(f"is {weights!r}", where=WEIGHTS, hint="Give the members' weights, which sum to one.")
    _check(GROUP, given[GROUP], isinstance(given[GROUP], str) and given[GROUP] != "", "a name")
    member = given[MEMBER]
    _check(MEMBER, member, _is_integer(member, len(weights) - 1), f"an integer from 0 to {len(weights) - 1}")
    mixture = given.get(MIXTURE, "sequence")
    _check(MIXTURE, mixture, mixture in MIXTURES, " or ".join(MIXTURES))
    alternatives = given.get(ALTERNATIVES, 0)
    most = MOST_ALTERNATIVES
    _check(ALTERNATIVES, alternatives, _is_integer(alternatives, most), f"an integer from 0 to {most}")
    members = given.get(MEMBERS, 0)
    _check(MEMBERS, members, members in (0, 1), "0 or 1")
    return Membership(given[GROUP], member, tuple(map(float, weights)), mixture, alternatives, bool(members))


def _check(key: str, value: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ConfigError(f"is {value!r}", where=key, hint=f"Give {expected}.")


def _is_integer(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_distribution(weights: Any) -> bool:
    if not isinstance(weights, Sequence) or isinstance(weights, str) or not weights:
        return False
    if not all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights):
        return False
    return math.isclose(sum(weights), 1.0, rel_tol=1e-6)
