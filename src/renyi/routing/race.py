"""Scores a batch in blocks of tokens, and stops scoring a member for an example once the member falls behind.

Read next: `statistics.py`.
"""

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from renyi.ensemble import JointOutput
from renyi.labels import IGNORED
from renyi.objectives import example_responsibilities
from renyi.routing.plan import Batch, RoutingPlan
from renyi.routing.statistics import PassStatistics

if TYPE_CHECKING:
    from renyi.ensemble import LoraEnsemble

FIRST_BLOCK = 16  # tokens of the first block; each next block ends at twice the position


def race(ensemble: "LoraEnsemble", plan: RoutingPlan, batch: Batch, alpha: float) -> tuple[JointOutput, PassStatistics]:
    """Score a batch. A member is dropped for an example when its responsibility falls below the threshold.

    A dropped member is not scored further. Its later tokens get the scores of the member that leads, so the difference
    between the two stays the same. The error of this is the responsibility that was dropped; the statistics report it.

    Args:
        ensemble: M members (or draws of members) on a base that caches keys and values of attention.
        plan: its threshold is the responsibility below which a member is dropped.
        batch: arguments of the joint forward, with labels, padded on the right.
        alpha: the order of the responsibilities, the same as for the loss of this batch.
    """
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]  # padding is on the right, where no token sees it
    (rows, length), device = ids_BT.shape, ids_BT.device
    tokens_BT, num_members = labels_BT[:, 1:] != IGNORED, ensemble.draws * len(ensemble.members)
    places_B = ensemble.places(rows)
    members = torch.arange(num_members, device=device).repeat_interleave(rows)
    examples = torch.arange(rows, device=device).repeat(num_members)
    alive_MB = torch.ones(num_members, rows, dtype=torch.bool, device=device)
    leader_B = torch.zeros(rows, dtype=torch.long, device=device)
    precision = torch.promote_types(ensemble.dtype, torch.float32)
    scores = [
        torch.zeros(num_members, rows, length - 1, dtype=t, device=device) for t in (precision, precision, torch.bool)
    ]
    cache = DynamicCache(config=ensemble.base.config)
    start, scored, dropped = 0, 0, 0.0
    for end in _block_ends(length):
        targets_Pn = labels_BT[examples, start + 1 : end + 1]  # nothing follows the last token
        block = slice(start, start + targets_Pn.shape[1])
        cached = {ensemble.cache_name: cache, "use_cache": True}
        if len(members) == num_members * rows:  # no member was dropped: the pairs are the rows of the joint forward
            hidden_1PnD = ensemble.hidden_states(ids_BT[:, start:end], None, cached).flatten(0, 1)[None]
        else:
            with ensemble.pairing(members.tolist(), places_B[examples]):
                hidden_1PnD = ensemble.hidden_states(ids_BT[examples, start:end], None, cached)
        found = ensemble.score_states(hidden_1PnD[:, :, : targets_Pn.shape[1]], targets_Pn)
        for whole_MBT, part_1Pn in zip(scores, (found.log_probs, found.entropy, found.is_top1), strict=True):
            whole_MBT[members, examples, block] = part_1Pn[0]
            of_leader_Bn = whole_MBT[leader_B, torch.arange(rows, device=device), block]
            whole_MBT[..., block] = torch.where(alive_MB[..., None], whole_MBT[..., block], of_leader_Bn)
        scored += len(members) * (end - start)
        start = end
        if end == length:
            break
        r_MB = example_responsibilities(
            scores[0].sum(dim=-1),
            tokens_BT[:, :end].sum(dim=1),
            alpha,
            ensemble.drawn_weights.log(),
            ensemble.routing_quantity,
        )
        leader_B = r_MB.masked_fill(~alive_MB, -1.0).argmax(dim=0)
        falls_MB = alive_MB & (r_MB < plan.threshold)
        dropped += r_MB[falls_MB].sum().item()
        keep = (~falls_MB)[members, examples].nonzero().squeeze(1)
        if len(keep) < len(members):
            alive_MB &= ~falls_MB
            members, examples = members[keep], examples[keep]
            cache.batch_select_indices(keep)
    statistics = PassStatistics(scored / (num_members * rows * length), dropped / rows)
    return JointOutput(scores[0], tokens_BT, scores[1], scores[2]), statistics


def _block_ends(length: int) -> list[int]:
    ends = [FIRST_BLOCK]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    return [*ends[:-1], length]
