"""Runs the joint forward of an ensemble so that the backward trains only the pairs that a plan (`plan.py`) selects.

The loss couples members by one number per member and example: the gradient with respect to the log-likelihood. So a
training step need not keep a graph of all pairs:

1. The forward scores all pairs without a graph.
2. The backward receives the gradient of each pair. `member_shares` in `statistics.py` turns it into members' shares.
3. The pairs that the plan selects by their shares are run again with a graph, in passes within the token budget.

Read next: `race.py`, a faster way of scoring.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from renyi.batches import batches_by_length
from renyi.ensemble import JointOutput, LoraEnsemble, evaluating
from renyi.errors import ConfigError
from renyi.labels import IGNORED
from renyi.objectives import example_responsibilities
from renyi.routing.kept import KeptScores
from renyi.routing.plan import ROUTED_ROW, SHARE, Batch, RoutingPlan, row_lengths, take_examples
from renyi.routing.race import race
from renyi.routing.statistics import AutoRouting, PassStatistics, member_shares


class Routed(NamedTuple):
    """The output of a joint forward, and the statistics of what it scored and left out."""

    output: JointOutput
    statistics: PassStatistics


class Router:
    """Runs batches through an ensemble by a plan.

    Attributes:
        ensemble: M members. The router does not change them.
        auto: the measurements that decide "auto" and "sparse". A trainer updates it.
        kept: the scores of earlier steps by which a member is drawn for a row, or None if every step scores its rows.
            Batches then have the numbers of their rows under `ROUTED_ROW`. It and `auto` are the router's only state.
        runs_first_for_all: whether all members are equal while alpha is 0. Then the first of them is run for every
            example, and whoever calls gives its gradient to the others.
    """

    def __init__(self, ensemble: LoraEnsemble, plan: RoutingPlan):
        self.ensemble, self.auto, self._plan = ensemble, AutoRouting(), plan
        self.kept: KeptScores | None = None
        self.runs_first_for_all = False

    @property
    def plan(self) -> RoutingPlan:
        """The plan of the next forward: the given plan, with "dense" or "sparse" as `AutoRouting` chooses."""
        return replace(self._plan, kind=self.auto.choice(self._plan.kind))

    def forward(self, batch: Batch, alpha: float, through: nn.Module | None = None) -> Routed:
        """The joint forward, whose backward trains the pairs that the plan selects.

        The values are those of the plain forward without dropout, with two exceptions. With "raced", tokens that were
        not scored get the values of the member that leads. With alpha 0, the responsibilities are the mixture weights
        in any case, and with kept scores they follow from these. So if one member per example is drawn, only that
        member is run. The other members get its values, and differ from it by as much as in the kept scores.

        Without gradients, or in evaluation mode, this is the plain forward.

        Args:
            batch: arguments of `LoraEnsemble.forward`; it may also hold the keys `SHARE` and `ROUTED_ROW`.
            alpha: the order at which this batch is trained.
            through: the wrapper of the ensemble that exchanges gradients (DistributedDataParallel). Its forward has to
                run as well.
        """
        wrapper, rows_E = self.ensemble if through is None else through, batch.get(ROUTED_ROW)
        batch = {name: value for name, value in batch.items() if name not in (SHARE, ROUTED_ROW)}
        rows, length = batch["input_ids"].shape
        learns = self.ensemble.training and torch.is_grad_enabled()
        if not learns or self.plan.is_plain(self._copies * rows, length):
            return Routed(wrapper(**batch), PassStatistics())
        if batch.get("labels") is None:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            batch["labels"] = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
        if wrapper is self.ensemble:
            return self._forward(batch, alpha, rows_E)
        return _through(wrapper, self.ensemble, self._forward, batch, alpha, rows_E)

    def _forward(self, batch: Batch, alpha: float, rows_E: Tensor | None) -> Routed:
        if not self.ensemble.recomputes_members:
            raise ConfigError(
                "use_reentrant is true, and this step runs some pairs of members and examples at a time",
                where="gradient_checkpointing_kwargs",
                hint="Set use_reentrant to false, or train with routing 'dense' and no token budget.",
            )
        examples = len(batch["input_ids"]) // self.plan.rows_per_example
        share_ME = self.ensemble.drawn_weights[:, None].expand(-1, examples)
        if alpha == 0 and self.runs_first_for_all:
            first_ME = torch.zeros_like(share_ME)
            first_ME[0] = 1
            return self._drawn_forward(batch, first_ME)
        if self.plan.kind in ("sampled", "raced") and self.plan.takes(*batch["input_ids"].shape):
            if alpha == 0:
                return self._drawn_forward(batch, self._one_of(share_ME))
            if self.kept is not None and rows_E is not None and (known_ME := self.kept.visit(rows_E)) is not None:
                known_ME, tokens_E = known_ME.to(share_ME.device), (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
                log_weights, quantity = self.ensemble.drawn_weights.log(), self.ensemble.routing_quantity
                r_ME = example_responsibilities(known_ME.to(share_ME), tokens_E, alpha, log_weights, quantity)
                return self._drawn_forward(batch, self._one_of(r_ME), known_ME)
        with torch.no_grad(), evaluating(self.ensemble):
            output, statistics = self._scored(batch, alpha)
        if self.kept is not None and rows_E is not None:
            self.kept.record(rows_E, self.ensemble.gathered(output.log_probs.sum(dim=-1)))
        parameters = [p for p in self.ensemble.parameters() if p.requires_grad]
        device = output.log_probs.device.type
        casts, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        plan, places_B = self.plan, self._places(batch)

        def gradients(upstream_MBT: Tensor) -> list[Tensor]:
            with torch.autocast(device, dtype, enabled=casts), torch.enable_grad():
                return self._train_pairs(plan, batch, places_B, upstream_MBT, parameters)

        log_probs = _Deferred.apply(output.log_probs, gradients, *parameters)
        return Routed(output._replace(log_probs=log_probs), statistics)

    def _train_pairs(
        self, plan: RoutingPlan, batch: Batch, places_B: Tensor, upstream_MBT: Tensor, parameters: list[nn.Parameter]
    ) -> list[Tensor]:
        """Gradients with respect to the parameters of Σ upstream · log-probability over the selected pairs."""
        if plan.kind == "dense" and plan.takes(self._copies, batch["input_ids"].shape[1]):
            return self._train_rows(plan, batch, places_B, upstream_MBT, parameters)
        share_ME = member_shares(upstream_MBT, plan.rows_per_example, self.ensemble.gathered)
        if plan.kind == "sparse":
            weight_ME = (share_ME >= plan.threshold).to(share_ME)
        elif plan.kind == "dense":
            weight_ME = torch.ones_like(share_ME)
        else:
            weight_ME = self._one_of(share_ME)
        weight_MB = self._own(weight_ME).repeat(1, plan.rows_per_example)
        members, rows = ((weight_MB > 0) & upstream_MBT.any(dim=-1)).nonzero(as_tuple=True)
        upstream_PT = upstream_MBT[members, rows] * weight_MB[members, rows, None]
        gradients = [torch.zeros_like(p) for p in parameters]
        if not len(rows):
            return gradients
        lengths_P = row_lengths(batch)[rows.cpu()].tolist()
        budget = len(rows) * max(lengths_P) if plan.token_budget is None else plan.token_budget
        budget = 1 if "cu_seq_lens_q" in batch else budget  # the boundaries of examples belong to one packed row
        for together in batches_by_length(lengths_P, budget):
            at = torch.tensor(together, device=rows.device)
            with self.ensemble.pairing(members[at].tolist(), places_B[rows[at]]):
                self._add_gradients(gradients, parameters, batch, rows[at], upstream_PT[None, at])
        return gradients

    def _train_rows(
        self, plan: RoutingPlan, batch: Batch, places_B: Tensor, upstream_MBT: Tensor, parameters: list[nn.Parameter]
    ) -> list[Tensor]:
        """The same for all pairs, in passes of some rows under all members. They are faster than passes of pairs."""
        assert plan.token_budget is not None  # otherwise the plain forward is enough
        gradients = [torch.zeros_like(p) for p in parameters]
        for together in batches_by_length(row_lengths(batch).tolist(), plan.token_budget // self._copies):
            at = torch.tensor(together, device=upstream_MBT.device)
            with self.ensemble.of_examples(places_B[at]):
                self._add_gradients(gradients, parameters, batch, at, upstream_MBT[:, at])
        return gradients

    def _add_gradients(
        self, gradients: list[Tensor], parameters: list[nn.Parameter], batch: Batch, rows: Tensor, upstream_MPT: Tensor
    ) -> None:
        """Add what a pass over some rows of a batch gives, whose upstream gradients are [M, P, T]."""
        log_probs_MPT = self.ensemble(**take_examples(batch, rows)).log_probs
        found = torch.autograd.grad(log_probs_MPT, parameters, upstream_MPT[..., : log_probs_MPT.shape[-1]])
        torch._foreach_add_(gradients, list(found))

    def _drawn_forward(self, batch: Batch, weight_ME: Tensor, known_ME: Tensor | None = None) -> Routed:
        """One pass with a graph, with one member per example.

        A process runs the examples that its own members have drawn, and gets the values of the others.

        Args:
            batch: as for `forward`.
            weight_ME: the weight of the drawn member of each example, and 0 of the others.
            known_ME: kept ℓ of the examples, whose distances between members are those of the output; or None.
        """
        (rows, length), per_example = batch["input_ids"].shape, self.plan.rows_per_example
        weight_MB = self._own(weight_ME).repeat(1, per_example)
        at = weight_MB.any(dim=0).nonzero().squeeze(1)
        if len(at):
            with self.ensemble.pairing(weight_MB[:, at].argmax(dim=0).tolist(), self._places(batch)[at]):
                output = self.ensemble(**(batch if len(at) == rows else take_examples(batch, at)))
        else:
            output = self._of_no_row(batch["input_ids"].device)
        if self.ensemble.mesh is not None:
            output = self._of_all_processes(_padded(output, length - 1), at, rows)
        of_all = JointOutput(*(x if x is output.label_mask else x.expand(len(weight_MB), -1, -1) for x in output))
        without_graph = output.log_probs.detach()
        log_probs = without_graph + weight_MB[..., None] * (output.log_probs - without_graph)
        if known_ME is not None:  # the distance in ℓ of the others, spread over the tokens
            apart_ME = known_ME - known_ME.gather(0, weight_ME.argmax(dim=0, keepdim=True))
            apart_ME = apart_ME / output.label_mask.sum(dim=-1).clamp(min=1)
            log_probs = log_probs + self._own(apart_ME.to(log_probs))[..., None] * output.label_mask
        return Routed(of_all._replace(log_probs=log_probs), PassStatistics(scored=0.0))

    def _of_no_row(self, device: torch.device) -> JointOutput:
        """What a forward of no row gives. Its log-probabilities have a graph, as every process needs one."""
        dtype = torch.promote_types(self.ensemble.dtype, torch.float32)
        nothing = torch.zeros(1, 0, 0, dtype=dtype, device=device)
        reached = sum(p.flatten()[0] for p in self.ensemble.parameters() if p.requires_grad)
        return JointOutput(nothing + 0 * reached, nothing[0].bool(), nothing, nothing.bool())

    def _of_all_processes(self, output: JointOutput, at: Tensor, rows: int) -> JointOutput:
        """The output for all rows of a batch, of which each process has given those at `at`."""
        own = [x.expand(1, -1, -1).to(output.log_probs.dtype) for x in output]
        whole = [x.new_zeros(1, rows, x.shape[-1]).index_copy(1, at, x) for x in own]
        log_probs, label_mask, entropy, is_top1 = (self.ensemble.gathered(x).sum(dim=0, keepdim=True) for x in whole)
        return JointOutput(log_probs, label_mask[0].bool(), entropy, is_top1.bool())

    def _one_of(self, share_ME: Tensor) -> Tensor:
        """Weights [M, E]: one member of each example is drawn by its share and gets the inverse of it, others get 0.

        Processes with other members take the draw of the first of them.
        """
        drawn_1E = torch.multinomial(share_ME.T.clamp(min=torch.finfo(share_ME.dtype).tiny), 1).T
        drawn_1E = self.ensemble.gathered(drawn_1E)[:1]
        inverse_1E = 1 / share_ME.gather(0, drawn_1E).clamp(min=1e-30)
        return torch.zeros_like(share_ME).scatter_(0, drawn_1E, inverse_1E)

    def _own(self, values_ME: Tensor) -> Tensor:
        """Of the values of all members those of the members that this process holds."""
        members, draws = self.ensemble.members, self.ensemble.draws
        return values_ME[members.start * draws : members.stop * draws]

    def _scored(self, batch: Batch, alpha: float) -> tuple[JointOutput, PassStatistics]:
        """Score all pairs, in passes of as many examples as the budget allows under all members."""
        (rows, length), members = batch["input_ids"].shape, self._copies
        places_B = self._places(batch)
        if self.plan.takes(members * rows, length):
            return self._score(batch, alpha)
        assert self.plan.token_budget is not None
        order, parts, scored, dropped = list[int](), [], 0.0, 0.0
        for together in batches_by_length(row_lengths(batch).tolist(), self.plan.token_budget // members):
            at = torch.tensor(together, device=batch["input_ids"].device)
            with self.ensemble.of_examples(places_B[at]):
                output, statistics = self._score(take_examples(batch, at), alpha)
            parts.append(_padded(output, length - 1))
            order += together
            scored += statistics.scored * len(at) / rows
            dropped += statistics.dropped * len(at) / rows
        back = torch.tensor(order, device=batch["input_ids"].device).argsort()
        columns = [torch.cat(column, dim=-2).index_select(-2, back) for column in zip(*parts, strict=True)]
        return JointOutput(*columns), PassStatistics(scored, dropped)

    @property
    def _copies(self) -> int:
        """How often a joint forward of this process runs each row: under each draw of each of its members."""
        return self.ensemble.draws * len(self.ensemble.members)

    def _places(self, batch: Batch) -> Tensor:
        return self.ensemble.places(len(batch["input_ids"]), self.plan.rows_per_example)

    def _score(self, batch: Batch, alpha: float) -> tuple[JointOutput, PassStatistics]:
        if self.plan.kind == "raced":
            return race(self.ensemble, self.plan, batch, alpha)
        return self.ensemble(**batch), PassStatistics()


class _Deferred(torch.autograd.Function):
    """Returns known values; computes their gradients with respect to parameters when the upstream gradient arrives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: Callable[[Tensor], list[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(upstream)


def _through(wrapper: nn.Module, module: nn.Module, method: Callable[..., Routed], *args: Any) -> Routed:
    """Call `wrapper`, and run `method(*args)` where it calls the forward of the module that it wraps.

    DistributedDataParallel prepares its exchange of gradients in its own forward, and calls only the module's forward.
    So `method` takes the place of that forward for one call. TRL and Lightning use the same trick.
    """
    own = vars(module).get("forward")

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    def once(*given: Any) -> Routed:
        restore()  # because `method` calls the module's real forward
        return method(*given)

    module.forward = once
    try:
        return wrapper(*args)
    finally:
        restore()


def _padded(output: JointOutput, length: int) -> JointOutput:
    return JointOutput(*(F.pad(x, (0, length - x.shape[-1])) for x in output))
