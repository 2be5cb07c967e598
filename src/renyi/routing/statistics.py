"""What is counted of routing: what a pass scored and left out, who takes the examples, and what "auto" goes by."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi.objectives import effective_members, renyi_loss
from renyi.routing.plan import RoutingPlan

Sums = Mapping[str, tuple[Tensor, Tensor]]  # by logged name: what is added up, and what it is divided by

# By how much "sparse" must be cheaper than "dense" by its reckoning for "auto" to take it.
MARGIN = 0.05


class PassStatistics(NamedTuple):
    """What one forward scored, and what it left out.

    Attributes:
        scored: share of all members' tokens that were scored.
        dropped: responsibility of the members that a race left behind, at the moment it did: a mean over examples.
    """

    scored: float = 1.0
    dropped: float = 0.0


@dataclass
class AutoRouting:
    """What "auto" goes by: what scoring costs, measured once, and the share of pairs that matter.

    Attributes:
        scoring_cost: seconds of a pass without a graph, divided by those of a dense step; None until it is measured.
        active: share of pairs at or above the threshold, a moving mean over batches.
    """

    scoring_cost: float | None = None
    active: float = 1.0

    @property
    def kind(self) -> str:
        """ "sparse" where a scoring pass and the pairs that matter are cheaper than all pairs, else "dense"."""
        cost = self.scoring_cost
        return "sparse" if cost is not None and cost + self.active < 1 - MARGIN else "dense"

    def observe(self, share_ME: Tensor, threshold: float) -> None:
        """Take note of the members' shares [M, E] of a training batch."""
        self.active += 0.1 * ((share_ME >= threshold).float().mean().item() - self.active)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)


def member_shares(upstream_MBT: Tensor, rows_per_example: int) -> Tensor:
    """Each member's share of the gradient that arrives at an example's log-probabilities, [M, E].

    Where the log-probabilities are summed to the log-likelihood ℓ that is routed, this is the responsibility. For
    preference pairs the gradient by a log-probability has a factor more, which differs between members.

    Args:
        upstream_MBT: gradient by the log-probabilities [M, B, T] of a joint forward.
        rows_per_example: 2 for pairs, whose rejected rows come after all chosen ones.
    """
    size_MB = upstream_MBT.abs().sum(dim=-1)
    size_ME = size_MB.unflatten(1, (rows_per_example, -1)).sum(dim=1)
    return size_ME / size_ME.sum(dim=0).clamp(min=torch.finfo(size_ME.dtype).tiny)


def pair_sums(
    share_ME: Tensor, r_ME: Tensor, plan: RoutingPlan, passed: PassStatistics
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is logged of the pairs of a training batch that was run by `plan`.

    A member's gradient changes by at most Σ r ‖∇ℓ‖ over the pairs that are left out; `routing/dropped` is Σ r of an
    example.

    Args:
        share_ME: `member_shares` [M, E], by which pairs are left out.
        r_ME: responsibilities [M, E].
        plan: its kind is not "auto".
        passed: what the forward left out.
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


def routing_sums(ell_ME: Tensor, r_ME: Tensor, log_weights: Tensor, units: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What any ensemble logs of a batch of E examples, from log-likelihoods and responsibilities [M, E].

    Negative log-likelihoods and the Jensen gap are per unit, of which the batch holds `units`: trained tokens, or
    examples.
    """
    members, mixture = renyi_loss(ell_ME, 0.0, log_weights).sum(), renyi_loss(ell_ME, 1.0, log_weights).sum()
    sums = {
        "nll_members": (members, units),
        "nll_mixture": (mixture, units),
        "jensen_gap": (members - mixture, units),
    }
    return sums | member_sums(r_ME)


def member_sums(r_ME: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Who takes the examples, from responsibilities [M, E]."""
    examples = r_ME.new_tensor(r_ME.shape[1])
    sums = {"effective_members": (effective_members(r_ME).sum(), examples)}
    return sums | {f"member_load/{m}": (load, examples) for m, load in enumerate(r_ME.sum(dim=1))}
