"""Statistics of routing: what a pass scored and left out, which members take the examples, and the choice of "auto".

Read next: `training/log.py`, which adds these sums up between two logs.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi.objectives import effective_members, renyi_loss
from renyi.routing.plan import RoutingPlan

Sums = Mapping[str, tuple[Tensor, Tensor]]  # by logged name: a sum, and the number that it is divided by

# "auto" takes "sparse" only if its estimated cost is lower than that of "dense" by this share.
MARGIN = 0.05
# "sparse" trains all pairs while more than this share of them matters. Scoring costs half of a dense step, and a pair
# that is trained by itself about a fifth more than in a dense pass.
MOST_ACTIVE = 0.4


class PassStatistics(NamedTuple):
    """What one forward scored, and what it left out.

    Attributes:
        scored: share of all members' tokens that were scored.
        dropped: responsibility of the members that a race dropped, at the time it dropped them: a mean over examples.
    """

    scored: float = 1.0
    dropped: float = 0.0


@dataclass
class AutoRouting:
    """The measurements that decide "auto" and "sparse": the cost of scoring, and the share of pairs that matter.

    Attributes:
        scoring_cost: seconds of a pass without a graph, divided by the seconds of a dense step; measured once, None
            before that.
        active: share of pairs at or above the threshold, a moving mean over batches; None before the first batch.
    """

    scoring_cost: float | None = None
    active: float | None = None

    def choice(self, kind: str) -> str:
        """How the next batch is trained if `kind` was asked for.

        "auto" is "sparse" if a scoring pass and training the active pairs cost less than training all pairs, else
        "dense". "sparse" is "dense" while more than `MOST_ACTIVE` of the pairs are active.
        """
        cost, active = self.scoring_cost, self.active
        if kind == "auto":
            pays = cost is not None and active is not None and cost + active < 1 - MARGIN
            return "sparse" if pays else "dense"
        return "dense" if kind == "sparse" and active is not None and active > MOST_ACTIVE else kind

    def observe(self, share_ME: Tensor, threshold: float) -> None:
        """Update `active` from the members' shares [M, E] of a training batch."""
        share = (share_ME >= threshold).float().mean().item()
        self.active = share if self.active is None else self.active + 0.1 * (share - self.active)

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores."""
        return asdict(self)


def member_shares(
    upstream_MBT: Tensor, rows_per_example: int, gathered: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Each member's share of the gradient that arrives at an example's log-probabilities, [M, E].

    If the loss takes the sum ℓ of the log-probabilities, the share is the responsibility. For preference pairs the
    gradient with respect to a log-probability has one more factor, which differs between members.

    Args:
        upstream_MBT: gradient with respect to the log-probabilities [M, B, T] of a joint forward.
        rows_per_example: 2 for pairs, whose rejected rows come after all chosen rows.
        gathered: gives the values [M, …] of all members from those of a process's own; see `MemberMesh.gather`.
    """
    size_MB = upstream_MBT.abs().sum(dim=-1)
    size_ME = gathered(size_MB.unflatten(1, (rows_per_example, -1)).sum(dim=1))
    return size_ME / size_ME.sum(dim=0).clamp(min=torch.finfo(size_ME.dtype).tiny)


def pair_sums(
    share_ME: Tensor, r_ME: Tensor, plan: RoutingPlan, passed: PassStatistics
) -> dict[str, tuple[Tensor, Tensor]]:
    """The logged sums about the pairs of a training batch that was run by `plan`.

    Leaving pairs out changes a member's gradient by at most Σ r ‖∇ℓ‖ over these pairs. `routing/dropped` is the mean
    over examples of Σ r over the pairs that are left out.

    Args:
        share_ME: `member_shares` [M, E], which decide the pairs that are left out.
        r_ME: responsibilities [M, E].
        plan: its kind is not "auto".
        passed: what the forward scored and left out.
    """
    one, examples = torch.ones((), device=r_ME.device), r_ME.new_tensor(r_ME.shape[1])
    if plan.kind in ("dense", "sparse"):
        left_out = share_ME < (plan.threshold if plan.kind == "sparse" else 0.0)
        active, dropped = (~left_out).float().mean(), (r_ME * left_out).sum() / examples
    else:
        active, dropped = one / len(r_ME), one * passed.dropped
    return {
        "routing/active": (active * examples, examples),
        "routing/dropped": (dropped * examples, examples),
        "routing/scored": (one * passed.scored * examples, examples),
    }


def routing_sums(
    ell_ME: Tensor, r_ME: Tensor, log_weights: Tensor, units: Tensor, draws: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """The sums that every ensemble logs for a batch of E examples, from ℓ and responsibilities [M, E].

    Negative log-likelihoods and the Jensen gap are logged per unit. A unit is a trained token or an example, and
    `units` is their number in the batch. With S `draws` of each member everything has M·S instead of M; what is
    logged of a member is the sum over its draws.
    """
    members, mixture = renyi_loss(ell_ME, 0.0, log_weights).sum(), renyi_loss(ell_ME, 1.0, log_weights).sum()
    sums = {
        "nll_members": (members, units),
        "nll_mixture": (mixture, units),
        "jensen_gap": (members - mixture, units),
    }
    return sums | member_sums(r_ME.unflatten(0, (-1, draws)).sum(dim=1))


def member_sums(r_ME: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The sums about which members take the examples, from responsibilities [M, E]."""
    examples = r_ME.new_tensor(r_ME.shape[1])
    sums = {"effective_members": (effective_members(r_ME).sum(), examples)}
    return sums | {f"member_load/{m}": (load, examples) for m, load in enumerate(r_ME.sum(dim=1))}
