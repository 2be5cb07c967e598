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
    Where members are split over processes, each scores its own and gets the scores of the others after each block.

    Args:
        ensemble: M members (or draws of members) on a base that caches keys and values of attention.
        plan: its threshold is the responsibility below which a member is dropped.
        batch: arguments of the joint forward, with labels, padded on the right.
        alpha: the order of the responsibilities, the same as for the loss of this batch.
    """
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]  # padding is on the right, where no token sees it
    (rows, length), device = ids_BT.shape, ids_BT.device
    tokens_BT, draws = labels_BT[:, 1:] != IGNORED, ensemble.draws
    own = slice(ensemble.members.start * draws, ensemble.members.stop * draws)
    num_own, num_all = own.stop - own.start, draws * ensemble.num_members
    places_B = ensemble.places(rows)
    members = torch.arange(num_own, device=device).repeat_interleave(rows)
    examples = torch.arange(rows, device=device).repeat(num_own)
    alive_MB = torch.ones(num_all, rows, dtype=torch.bool, device=device)
    leader_B = torch.zeros(rows, dtype=torch.long, device=device)
    precision = torch.promote_types(ensemble.dtype, torch.float32)
    scores_MBT3 = torch.zeros(num_all, rows, length - 1, 3, dtype=precision, device=device)
    cache = DynamicCache(config=ensemble.base.config)
    start, scored, dropped = 0, 0, 0.0
    for end in _block_ends(length):
        targets_Pn = labels_BT[examples, start + 1 : end + 1]  # nothing follows the last token
        block = slice(start, start + targets_Pn.shape[1])
        cached = {ensemble.cache_name: cache, "use_cache": True}
        found_MBn3 = scores_MBT3[own, :, block].clone()
        if len(members) == num_own * rows:  # no member was dropped: the pairs are the rows of the joint forward
            hidden_1PnD = ensemble.hidden_states(ids_BT[:, start:end], None, cached).flatten(0, 1)[None]
        elif len(members):
            with ensemble.pairing(members.tolist(), places_B[examples]):
                hidden_1PnD = ensemble.hidden_states(ids_BT[examples, start:end], None, cached)
        if len(members):
            found = ensemble.score_states(hidden_1PnD[:, :, : targets_Pn.shape[1]], targets_Pn)
            kinds = (found.log_probs[0], found.entropy[0], found.is_top1[0])
            found_MBn3[members, examples] = torch.stack([kind.to(precision) for kind in kinds], dim=-1)
        found_MBn3 = ensemble.gathered(found_MBn3)  # of other processes' members, too
        of_leader_Bn3 = found_MBn3[leader_B, torch.arange(rows, device=device)]
        scores_MBT3[:, :, block] = torch.where(alive_MB[..., None, None], found_MBn3, of_leader_Bn3)
        scored += len(members) * (end - start)
        start = end
        if end == length:
            break
        r_MB = example_responsibilities(
            scores_MBT3[..., 0].sum(dim=-1),
            tokens_BT[:, :end].sum(dim=1),
            alpha,
            ensemble.drawn_weights.log(),
            ensemble.routing_quantity,
        )
        leader_B = r_MB.masked_fill(~alive_MB, -1.0).argmax(dim=0)
        falls_MB = alive_MB & (r_MB < plan.threshold)
        dropped += r_MB[falls_MB].sum().item()
        keep = (~falls_MB[own])[members, examples].nonzero().squeeze(1)
        alive_MB &= ~falls_MB
        if len(keep) < len(members):
            members, examples = members[keep], examples[keep]
            cache.batch_select_indices(keep)
    log_probs, entropy, is_top1 = scores_MBT3[own].unbind(-1)
    statistics = PassStatistics(scored / (num_own * rows * length), dropped / rows)
    return JointOutput(log_probs, tokens_BT, entropy, is_top1.bool()), statistics


def _block_ends(length: int) -> list[int]:
    ends = [FIRST_BLOCK]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    return [*ends[:-1], length]
