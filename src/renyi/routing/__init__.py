"""Which pairs of members and examples a training step runs, and how many at a time.

Read in this order: `plan.py` (the settings), `router.py` (wraps the joint forward of an ensemble), `race.py` (scores in
blocks and stops scoring members that fall behind), `statistics.py` (counts what was scored and what was left out),
`kept.py` (scores of earlier steps), `groups.py` (rows that share one responsibility).
"""

from renyi.routing.groups import BatchGroups, GroupEvidence
from renyi.routing.kept import KeptScores, RowScores
from renyi.routing.plan import PLACES, ROUTED_ROW, ROUTINGS, SHARE, RoutingPlan, is_packed, share_of, split, unpacked
from renyi.routing.router import Routed, Router
from renyi.routing.statistics import (
    AutoRouting,
    PassStatistics,
    Sums,
    member_shares,
    member_sums,
    pair_sums,
    routing_sums,
)

__all__ = [
    "PLACES",
    "ROUTED_ROW",
    "ROUTINGS",
    "SHARE",
    "AutoRouting",
    "BatchGroups",
    "GroupEvidence",
    "KeptScores",
    "PassStatistics",
    "Routed",
    "Router",
    "RoutingPlan",
    "RowScores",
    "Sums",
    "is_packed",
    "member_shares",
    "member_sums",
    "pair_sums",
    "routing_sums",
    "share_of",
    "split",
    "unpacked",
]
