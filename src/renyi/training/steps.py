"""How a training step goes through its pairs of members and examples, and what that takes.

Mixed in before a TRL trainer. It splits a batch so that a pass fits the token budget, tells the ensemble which pairs to
train, and logs what was left out. What an example's log-likelihood is, and what is done with a gradient, others say.
"""

import resource
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from renyi.ensemble import LoraEnsemble
from renyi.ensemble.routing import Routing, take_examples
from renyi.errors import ConfigError
from renyi.training.statistics import Sums

# A pass of fewer tokens would leave a processor idle, whatever one member's batch is.
LEAST_BUDGET = 8192
# By how much "sparse" must be cheaper than "dense" by its reckoning for "auto" to take it.
MARGIN = 0.05


class RoutedSteps(Trainer):
    """Mixin for a trainer whose `model` is a `LoraEnsemble`."""

    model: LoraEnsemble
    args: Any
    rows_per_example = 1
    routings: tuple[str, ...] = ("dense", "sampled", "sparse", "raced", "auto")
    splits_batches = True  # whether a batch may come in parts; rollouts are generated for a whole one

    share = 1.0  # of the batch that `compute_loss` has in hand
    _scoring_cost: float | None = None  # of a pass without a graph, in terms of a dense step
    _active = 1.0  # share of pairs at or above the threshold, of late

    def start_routing(self) -> None:
        """Tell the ensemble how to go through its pairs.

        Raises:
            ConfigError: this trainer, or these settings, do not go with the routing.
        """
        args, kind = self.args, self.args.routing
        if kind not in self.routings:
            raise ConfigError(f"{kind!r} is not built here", where="routing", hint=f"Give {', '.join(self.routings)}.")
        self.model.routing = Routing(
            kind="dense" if kind == "auto" else kind,
            threshold=args.routing_threshold,
            token_budget=args.token_budget or self._default_budget(),
            rows_per_example=self.rows_per_example,
            responsibilities=lambda ell_MB, tokens_B: self.routed(ell_MB, tokens_B)[1],
        )

    def _default_budget(self) -> int | None:
        """What one member's largest batch takes, so that memory does not grow with the members."""
        length = getattr(self.args, "max_length", None)
        # Processes that share a base run it equally often.
        if not self.splits_batches or length is None or self.args.shard_base:
            return None
        return max(LEAST_BUDGET, self.args.per_device_train_batch_size * self.rows_per_example * length)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def routed(self, ell_ME: Tensor, tokens_E: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """TRL's, in as many parts as the token budget asks for; gradients are those of the whole batch."""
        routing = self.model.routing
        assert routing is not None
        routing.undivided = self.current_alpha == 0
        if self.args.routing == "auto":
            self._choose(routing, inputs)
        parts = self._parts(routing, inputs)
        started, syncs = time.perf_counter(), self.accelerator.sync_gradients
        losses = []
        for number, part in enumerate(parts, 1):
            self.share = len(part["input_ids"]) / len(inputs["input_ids"]) if len(parts) > 1 else 1.0
            # Gradients of all parts travel together.
            self.accelerator.gradient_state._set_sync_gradients(syncs and number == len(parts))
            with self.accelerator.no_sync(model) if number < len(parts) else nullcontext():
                losses.append(super().training_step(model, part, num_items_in_batch))
        self.share = 1.0
        self._seconds = time.perf_counter() - started
        return torch.stack(losses).sum()

    @property
    def current_alpha(self) -> float:
        raise NotImplementedError

    def _parts(self, routing: Routing, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch by examples, few enough for all members in one pass; those of a part are about as long."""
        if routing.kind != "dense" or not self.splits_batches:
            return [inputs]  # the ensemble splits pairs
        rows, length = inputs["input_ids"].shape
        if routing.takes(len(self.model.members) * rows, length) or rows == self.rows_per_example:
            return [inputs]
        assert routing.token_budget is not None
        most = routing.token_budget // (len(self.model.members) * self.rows_per_example * length)
        examples = torch.arange(rows // self.rows_per_example)
        if "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(dim=1).view(self.rows_per_example, -1).amax(dim=0)
            examples = lengths.argsort(descending=True, stable=True).cpu()
        return [take_examples(inputs, at, self.rows_per_example) for at in examples.split(max(1, most))]

    # ---- "auto" ----------------------------------------------------------------------------------------------------

    def _choose(self, routing: Routing, inputs: dict[str, Any]) -> None:
        """Between "dense" and "sparse", by what scoring costs, measured once, and the share of pairs that matter."""
        if self._scoring_cost is None and self.state.global_step >= 2 and routing.kind == "dense":
            began = time.perf_counter()
            with torch.no_grad(), self.compute_loss_context_manager():
                self.model(**{k: v for k, v in self._prepare_inputs(inputs).items() if k in _OF_FORWARD})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._scoring_cost = (time.perf_counter() - began) / self._seconds
        cost = self._scoring_cost
        routing.kind = "sparse" if cost is not None and cost + self._active < 1 - MARGIN else "dense"

    def pair_sums(self, r_ME: Tensor) -> Sums:
        """What is logged of the pairs of a training batch, from responsibilities [M, E].

        Of what is dropped: a member's gradient changes by at most Σ r ‖∇ℓ‖ over the pairs that are left out.
        """
        routing = self.model.routing
        if routing is None or self.args.routing == "dense" or not self.model.training:
            return {}
        one, examples = torch.ones((), device=r_ME.device), r_ME.new_tensor(r_ME.shape[1])
        below_ME = r_ME < routing.threshold
        self._active += 0.1 * (1 - below_ME.float().mean().item() - self._active)
        if routing.kind in ("dense", "sparse"):
            left_out = below_ME if routing.kind == "sparse" else torch.zeros_like(below_ME)
            active, dropped, scored = (~left_out).float().mean(), (r_ME * left_out).sum() / examples, one
        else:
            active, dropped, scored = one / len(r_ME), one * routing.dropped, one * routing.scored
        return {
            "routing/active": (active * examples, examples),
            "routing/dropped": (dropped * examples, examples),
            "routing/scored": (scored * examples, examples),
        }

    def routing_state(self) -> dict[str, Any]:
        return {"scoring_cost": self._scoring_cost, "active": self._active}

    def restore_routing(self, state: dict[str, Any]) -> None:
        self._scoring_cost, self._active = state["scoring_cost"], state["active"]

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def rehearse(self) -> int:
        """Bytes at the peak of a step on the longest examples, optimizer state included; nothing is learned or kept.

        On a GPU those of tensors, on a CPU those of the process.
        """
        self.current_gradient_accumulation_steps = 1  # which the training loop would have said
        batch = self.data_collator(self._longest(self.args.per_device_train_batch_size))
        self.training_step(
            self.model, self._prepare_inputs(batch), self._get_num_items_in_batch([batch], self.args.device)
        )
        self.model.zero_grad(set_to_none=True)
        trained = sum(p.numel() * p.element_size() for p in self.trained_parameters())
        return peak_memory(self.args.device) + 2 * trained  # AdamW keeps two moments

    def _longest(self, many: int) -> list[dict[str, Any]]:
        """The longest rows of the training set."""
        rows: Any = self.train_dataset
        columns = [rows[name] for name in rows.column_names if name.endswith("ids")]
        lengths = torch.tensor([sum(map(len, row)) for row in zip(*columns, strict=True)])
        return [rows[i] for i in lengths.argsort(descending=True)[:many].tolist()]


_OF_FORWARD = ("input_ids", "attention_mask", "labels", "position_ids")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that this process took of a CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
