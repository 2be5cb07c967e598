"""Which (member, example) pairs a training step runs, and how many at a time.

Members are coupled by one number for each member and example: the gradient that arrives at a log-likelihood. So a
joint forward need not keep a graph of all pairs. It scores them without one; when the backward says how much each pair
matters, those that do are run again, as many at a time as memory holds. Nothing here knows an objective: how much a
pair matters is read off the gradient itself, of which a member's share is its responsibility.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache

from renyi.ensemble.rows import IGNORED, JointOutput

if TYPE_CHECKING:
    from renyi.ensemble.joint import JointModel

ROUTINGS = ("dense", "sampled", "sparse", "raced", "auto")
FIRST_BLOCK = 16  # tokens of the race's first block; each next one ends twice as far

Batch = dict[str, Any]  # the arguments of a joint forward


@dataclass
class Routing:
    """How training goes through the pairs of M members and E examples. "auto" is settled before, by the trainer.

    Attributes:
        kind: "dense", every pair; "sampled", one member an example, drawn by its share of the gradient and weighted
            with the inverse, so that the gradient is unbiased; "sparse", the pairs whose share is at least `threshold`;
            "raced", as "sampled", but members that fall behind are scored no further.
        threshold: ε, the share below which a pair is left out.
        token_budget: most tokens of a pass that keeps a graph, padding counted; None for no limit. To be scored, which
            keeps none, an example is run under all members at once, however many tokens these are.
        rows_per_example: 2 for batches of pairs, whose rejected rows come after all chosen ones.
        responsibilities: [M, E] of log-likelihoods [M, E] and trained tokens [E]; what "raced" goes by.
        undivided: whether responsibilities are the mixture weights whatever the members say (α = 0), so that nothing
            need be scored to draw by them.
        scored: share of all members' tokens that the last race scored.
        dropped: responsibility of the members it dropped, as they were dropped, a mean over examples.
    """

    kind: str = "dense"
    threshold: float = 0.01
    token_budget: int | None = None
    rows_per_example: int = 1
    responsibilities: Callable[[Tensor, Tensor], Tensor] | None = None
    undivided: bool = False
    scored: float = 1.0
    dropped: float = 0.0

    def takes(self, rows: int, length: int) -> bool:
        """Whether so many rows may be one pass."""
        return self.token_budget is None or rows * length <= self.token_budget

    def is_plain(self, rows: int, length: int) -> bool:
        """Whether the plain joint forward of so many member-major rows is all that is needed."""
        return self.kind == "dense" and self.takes(rows, length)


def routed_forward(ensemble: "JointModel", routing: Routing, batch: Batch) -> JointOutput:
    """The joint forward, of which a backward trains the pairs that `routing` takes.

    Values are those of the plain forward without dropout, but for what "raced" did not score, and, where shares are
    undivided, for members that were not drawn: these are taken to say what the drawn one says.
    """
    draws, rows = routing.kind in ("sampled", "raced"), len(batch["input_ids"])
    if draws and routing.undivided and routing.takes(rows, batch["input_ids"].shape[1]):
        return _drawn_forward(ensemble, routing, batch)
    with torch.no_grad(), _scoring(ensemble):
        scored = _scored(ensemble, routing, batch)
    parameters = [p for p in ensemble.parameters() if p.requires_grad]
    device = scored.log_probs.device.type
    casts, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def gradients(upstream_MBT: Tensor) -> list[Tensor]:
        with torch.autocast(device, dtype, enabled=casts), torch.enable_grad():
            return _train_pairs(ensemble, routing, batch, upstream_MBT, parameters)

    return scored._replace(log_probs=_Deferred.apply(scored.log_probs, gradients, *parameters))


class _Deferred(torch.autograd.Function):
    """Values that are known already; their gradient by parameters is computed when what comes from above is known."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: Callable[[Tensor], list[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(upstream)


def _train_pairs(
    ensemble: "JointModel", routing: Routing, batch: Batch, upstream_MBT: Tensor, parameters: list[nn.Parameter]
) -> list[Tensor]:
    """Gradients by the parameters of Σ upstream · log-probabilities over the pairs that are taken."""
    size_MB = upstream_MBT.abs().sum(dim=-1)
    size_ME = size_MB.unflatten(1, (routing.rows_per_example, -1)).sum(dim=1)
    share_ME = size_ME / size_ME.sum(dim=0).clamp(min=torch.finfo(size_ME.dtype).tiny)
    if routing.kind == "sparse":
        weight_ME = (share_ME >= routing.threshold).to(size_ME)
    elif routing.kind == "dense":
        weight_ME = torch.ones_like(size_ME)
    else:
        weight_ME = _one_of(share_ME)
    weight_MB = weight_ME.repeat(1, routing.rows_per_example)
    members, rows = ((weight_MB > 0) & (size_MB > 0)).nonzero(as_tuple=True)
    upstream_PT = upstream_MBT[members, rows] * weight_MB[members, rows, None]
    gradients = [torch.zeros_like(p) for p in parameters]
    if not len(rows):
        return gradients
    length = batch["input_ids"].shape[1]
    many = len(rows) if routing.token_budget is None else max(1, routing.token_budget // length)
    many = 1 if "cu_seq_lens_q" in batch else many  # a packed row says where its own examples begin
    for at in torch.arange(len(rows), device=rows.device).split(many):
        with ensemble.pairing(members[at].tolist()):
            log_probs_PT = ensemble(**take_examples(batch, rows[at])).log_probs[0]
            found = torch.autograd.grad(log_probs_PT, parameters, upstream_PT[at, : log_probs_PT.shape[1]])
        torch._foreach_add_(gradients, list(found))
    return gradients


def _one_of(share_ME: Tensor) -> Tensor:
    """Zero but for one member of each example, drawn by its share, which gets the inverse of it."""
    drawn_E = torch.multinomial(share_ME.T.clamp(min=torch.finfo(share_ME.dtype).tiny), 1).T
    return torch.zeros_like(share_ME).scatter_(0, drawn_E, 1 / share_ME.gather(0, drawn_E).clamp(min=1e-30))


def _drawn_forward(ensemble: "JointModel", routing: Routing, batch: Batch) -> JointOutput:
    """One pass with a graph of a member an example, drawn by mixture weight."""
    rows, per_example = len(batch["input_ids"]), routing.rows_per_example
    routing.scored, routing.dropped = 0.0, 0.0
    weight_ME = _one_of(ensemble.weights[:, None].expand(-1, rows // per_example))
    weight_MB = weight_ME.repeat(1, per_example)
    with ensemble.pairing(weight_MB.argmax(dim=0).tolist()):
        output = ensemble(**batch)
    of_all = JointOutput(*(x if x is output.label_mask else x.expand(len(weight_MB), -1, -1) for x in output))
    without_graph = output.log_probs.detach()
    return of_all._replace(log_probs=without_graph + weight_MB[..., None] * (output.log_probs - without_graph))


# ---- Scoring ---------------------------------------------------------------------------------------------------------


def _scored(ensemble: "JointModel", routing: Routing, batch: Batch) -> JointOutput:
    """All pairs, as many examples at a time as the budget allows under all members."""
    (rows, length), members = batch["input_ids"].shape, len(ensemble.members)
    score = race if routing.kind == "raced" else _joint
    if routing.takes(members * rows, length):
        return score(ensemble, routing, batch)
    assert routing.token_budget is not None
    many = max(1, routing.token_budget // (members * length))
    parts, scored, dropped = [], 0.0, 0.0
    for at in torch.arange(rows, device=batch["input_ids"].device).split(many):
        parts.append(_padded(score(ensemble, routing, take_examples(batch, at)), length - 1))
        scored, dropped = scored + routing.scored * len(at) / rows, dropped + routing.dropped * len(at) / rows
    routing.scored, routing.dropped = scored, dropped
    return JointOutput(*(torch.cat(column, dim=column[0].dim() - 2) for column in zip(*parts, strict=True)))


def _joint(ensemble: "JointModel", routing: Routing, batch: Batch) -> JointOutput:
    return ensemble(**batch)


def race(ensemble: "JointModel", routing: Routing, batch: Batch) -> JointOutput:
    """Scores by blocks of tokens; a member whose responsibility falls below the threshold is scored no further.

    Later tokens of a dropped member are taken to be as likely as under the member that leads then, so that it keeps its
    distance. What that neglects is logged as the responsibility that was dropped.

    Args:
        ensemble: its base caches keys and values of attention.
        routing: with `responsibilities`.
        batch: of the joint forward, padded on the right.
    """
    assert routing.responsibilities is not None
    ids_BT, mask_BT, labels_BT = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    (rows, length), device = ids_BT.shape, ids_BT.device
    tokens_BT, num_members = labels_BT[:, 1:] != IGNORED, len(ensemble.members)
    members = torch.arange(num_members, device=device).repeat_interleave(rows)
    examples = torch.arange(rows, device=device).repeat(num_members)
    alive_MB = torch.ones(num_members, rows, dtype=torch.bool, device=device)
    leader_B = torch.zeros(rows, dtype=torch.long, device=device)
    scores = [
        torch.zeros(num_members, rows, length - 1, dtype=t, device=device)
        for t in (torch.float, torch.float, torch.bool)
    ]
    cache = DynamicCache(config=ensemble.base.config)
    start, scored, dropped = 0, 0, 0.0
    for end in _race_ends(length):
        targets_Pn = labels_BT[examples, start + 1 : end + 1]  # nothing follows the last token
        block = slice(start, start + targets_Pn.shape[1])
        cached = {"past_key_values": cache, "use_cache": True}
        if len(members) == num_members * rows:  # nobody has fallen behind: pairs are the joint forward's rows
            mask = None if mask_BT is None else mask_BT[:, :end]
            hidden_1PnD = ensemble.hidden_states(ids_BT[:, start:end], mask, cached).flatten(0, 1)[None]
        else:
            mask = None if mask_BT is None else mask_BT[examples, :end]
            with ensemble.pairing(members.tolist()):
                hidden_1PnD = ensemble.hidden_states(ids_BT[examples, start:end], mask, cached)
        found = ensemble.score_states(hidden_1PnD[:, :, : targets_Pn.shape[1]], targets_Pn)
        for whole_MBT, part_1Pn in zip(scores, (found.log_probs, found.entropy, found.is_top1), strict=True):
            whole_MBT[members, examples, block] = part_1Pn[0]
            of_leader_Bn = whole_MBT[leader_B, torch.arange(rows, device=device), block]
            whole_MBT[..., block] = torch.where(alive_MB[..., None], whole_MBT[..., block], of_leader_Bn)
        scored += len(members) * (end - start)
        start = end
        if end == length:
            break
        r_MB = routing.responsibilities(scores[0].sum(dim=-1), tokens_BT[:, : end - 1].sum(dim=1).clamp(min=1))
        leader_B = r_MB.masked_fill(~alive_MB, -1.0).argmax(dim=0)
        falls_MB = alive_MB & (r_MB < routing.threshold)
        dropped += r_MB[falls_MB].sum().item()
        keep = (~falls_MB)[members, examples].nonzero().squeeze(1)
        if len(keep) < len(members):
            alive_MB &= ~falls_MB
            members, examples = members[keep], examples[keep]
            cache.batch_select_indices(keep)
    routing.scored, routing.dropped = scored / (num_members * rows * length), dropped / rows
    return JointOutput(scores[0], tokens_BT, scores[1], scores[2])


def _race_ends(length: int) -> list[int]:
    """Where blocks end."""
    ends = [FIRST_BLOCK]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    return [*ends[:-1], length]


@contextmanager
def _scoring(ensemble: "JointModel") -> Iterator[None]:
    """Without dropout or checkpoints. Linear layers stay as they are: on a CPU, bitsandbytes repacks evaluated ones."""
    modules = [m for m in ensemble.modules() if m.training and not isinstance(m, nn.Linear)]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def take_examples(batch: Batch, examples: Tensor, rows_per_example: int = 1) -> Batch:
    """Some examples of a batch, without columns that are padding in all of their rows."""
    many = len(batch["input_ids"])
    of_pairs = many // rows_per_example
    rows = torch.cat([examples + part * of_pairs for part in range(rows_per_example)])

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) not in (many, of_pairs):
            return value
        return value[rows.to(value.device) if len(value) == many else examples.to(value.device)]

    part = {name: taken(value) for name, value in batch.items()}
    mask = part.get("attention_mask")
    if mask is None:
        return part
    length, longest = mask.shape[1], int(mask.any(dim=0).nonzero().amax()) + 1
    wide = {k for k, v in part.items() if isinstance(v, Tensor) and v.dim() == 2 and v.shape[1] == length}
    return {k: v[:, :longest] if k in wide else v for k, v in part.items()}


def _padded(output: JointOutput, length: int) -> JointOutput:
    return JointOutput(*(F.pad(x, (0, length - x.shape[-1])) for x in output))
