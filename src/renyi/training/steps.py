"""How a training step runs its batch: in parts that fit the token budget, and through the router.

`RoutedSteps` is mixed in before a TRL trainer, and has what only a Trainer hook can do. Read next: `renyi.routing`,
what the router does with a batch.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from renyi.ensemble import LoraEnsemble
from renyi.errors import ConfigError
from renyi.machine import can_compile
from renyi.routing import (
    PLACES,
    ROUTED_ROW,
    SHARE,
    Routed,
    Router,
    RoutingPlan,
    Sums,
    is_packed,
    member_shares,
    pair_sums,
    split,
    unpacked,
)
from renyi.training.memory import LEAST_TOKENS, room_for_gradients, tokens_that_fit

# The least default budget: a pass of fewer tokens would not keep a processor busy.
LEAST_BUDGET = 8192
# The default budget on a CPU. Longer passes are no faster there, and take more memory.
CPU_BUDGET = 4096
# From so many operations on, a run on a CPU compiles blocks. It takes a minute, and saves about a tenth of every step.
LONG_RUN = 3e14


class RoutedSteps(Trainer):
    """Mixin for a trainer whose `model` is a `LoraEnsemble`."""

    model: LoraEnsemble
    args: Any
    router: Router
    rows_per_example = 1
    routings: tuple[str, ...] = ("dense", "sampled", "sparse", "raced", "auto")
    scheduled_alpha: float
    splits_batches = True  # whether a batch may be run in parts; False for rollouts, which belong to a whole batch

    def start_routing(self) -> None:
        """Make the router.

        Raises:
            ConfigError: this trainer does not go with the routing.
        """
        args, kind = self.args, self.args.routing
        if kind not in self.routings:
            raise ConfigError(f"{kind!r} is not built here", where="routing", hint=f"Give {', '.join(self.routings)}.")
        budget = args.token_budget or self._default_budget()
        if args.checkpoints_if_needed and budget is not None and args.device.type == "cpu":
            budget = self._without_checkpoints(budget)
        if args.compiles_if_it_pays and can_compile() and self._earns_compiling():
            args.compile_blocks = {"backend": "inductor", "mode": None}
        self._micro_batch = (-1, 0)  # the step, and the micro-batch in it
        self.router = Router(self.model, RoutingPlan(kind, args.routing_threshold, budget, self.rows_per_example))
        self.router.runs_first_for_all = args.alpha_hold_shared

    def _default_budget(self) -> int | None:
        """On a GPU the tokens of one member's largest batch, so that memory does not grow with the members."""
        length = getattr(self.args, "max_length", None)
        # Processes that share a base must run it equally often.
        if not self.splits_batches or length is None or self.args.shard_base or self.args.recomputes_reentrantly:
            return None
        if self.args.device.type == "cpu":
            return CPU_BUDGET
        return max(LEAST_BUDGET, self.args.per_device_train_batch_size * self.rows_per_example * length)

    def _without_checkpoints(self, budget: int) -> int:
        """Leave gradient checkpointing out if activations fit in memory; the tokens of a pass, at most `budget`."""
        args = self.args
        if not isinstance(self.train_dataset, Dataset):
            return budget
        longest = int(self._lengths.amax())
        fits = tokens_that_fit(self.model, longest, self.accelerator.autocast)
        example = longest * args.num_draws * len(self.model.members)  # a pass holds one example at least
        if fits < max(LEAST_TOKENS, example, args.token_budget or 0):
            return budget
        args.gradient_checkpointing = args.activation_checkpointing = False
        return min(budget, fits)

    def _earns_compiling(self) -> bool:
        """Whether compiled blocks make up for the time that compiling takes. A run that is resumed decides alike."""
        args, rows = self.args, self.train_dataset
        is_measured = args.device.type == "cpu" and args.routing in ("dense", "sparse", "auto")
        is_simple = args.world_size == 1 and self.splits_batches and not self.model.stack.is_random
        is_pefts = self.model.num_members == 1 and not args.bf16  # one that equals PEFT's adapter to the last digit
        if not (is_measured and is_simple and isinstance(rows, Dataset)) or is_pefts or args.recomputes_reentrantly:
            return False
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        seen = args.max_steps * step if args.max_steps > 0 else args.num_train_epochs * len(rows)
        tokens = seen * float(self._lengths.double().mean()) * self.model.num_members
        frozen = sum(p.numel() for p in self.model.base.parameters() if not p.requires_grad)
        return 4 * frozen * tokens >= LONG_RUN  # 2 forward, 2 for the gradient of the input

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Run the model as training does: the frozen base in the precision of its products, and blocks compiled."""
        args, how = self.args, self.args.compile_blocks
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        with ExitStack() as stack:
            stack.enter_context(self.model.stack.casting(precision))  # so that no step casts it
            if how is not None:  # lengths are variables of the graph, so that it serves all batches
                stack.enter_context(self.model.compiling(dynamic=True, **how))
                if args.compiles_if_it_pays:  # nobody asked, so a failure is a warning and no error
                    from torch._dynamo import config as compiler  # it takes seconds to import

                    stack.enter_context(compiler.patch(suppress_errors=True))
            yield

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """TRL's step, in as many parts as the token budget asks for. The gradients are those of the whole batch."""
        if self.args.routing == "auto":
            self._measure_scoring(inputs)
        parts = self._parts(inputs)
        started, syncs = time.perf_counter(), self.accelerator.sync_gradients
        first, losses = self._first_place(), []
        on_cpu = self.args.device.type == "cpu"
        with room_for_gradients(self.trained_parameters() if on_cpu else []):
            for number, part in enumerate(parts, 1):
                # Processes exchange gradients once, after the last part.
                self.accelerator.gradient_state._set_sync_gradients(syncs and number == len(parts))
                places = part.pop(PLACES, None) if isinstance(part, dict) else None  # GRPO gives a list of prompts
                with (
                    self._drawn(self.state.global_step, part, first, places),
                    self.accelerator.no_sync(model) if number < len(parts) else nullcontext(),
                ):
                    losses.append(super().training_step(model, part, num_items_in_batch))
        if self.args.alpha_hold_shared and self.scheduled_alpha == 0:
            for gradient in (p.grad for p in self.trained_parameters() if p.grad is not None):
                gradient[1:] = gradient[:1]
        self._seconds = time.perf_counter() - started
        return torch.stack(losses).sum()

    def _parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """What is run one after the other: parts within the token budget, or the whole batch."""
        plan, copies = self.router.plan, self.args.num_draws * len(self.model.members)
        if is_packed(batch) and not plan.is_plain(copies * len(batch["input_ids"]), batch["input_ids"].shape[1]):
            batch = unpacked(batch)
        whole = not self.splits_batches or self.args.routing_group is not None
        if plan.kind == "sparse" or whole:  # the router splits pairs
            return [batch]
        # A drawn member is the only one that is run with a graph.
        parts, kept = plan.parts(batch, copies if plan.kind == "dense" else 1), self.router.kept
        if kept is None or self.scheduled_alpha == 0 or ROUTED_ROW not in batch:
            return parts
        return [half for part in parts for half in split(part, kept.are_due(part[ROUTED_ROW]))]

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in TRL. Members are drawn as in training, with the same noise in every evaluation."""
        with self._drawn(-1, inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    @contextmanager
    def _drawn(self, step: int, batch: dict[str, Any], first: int = 0, places: Tensor | None = None) -> Iterator[None]:
        """Run the batch under draws of the members. Noise depends on the step and on the place of each example in it.

        So it does not matter how the examples of a step are split over micro-batches, parts and processes, and a run
        that is resumed sees the noise again.

        Args:
            step: the optimizer step.
            batch: or a part of one.
            first: the place of the whole batch's first example in the step.
            places: of the part's examples in the batch; None if it is the whole batch.
        """
        if not self.model.stack.is_random:
            yield
            return
        examples = len(batch["input_ids"]) // self.rows_per_example
        places = torch.arange(examples) if places is None else places
        self.model.redraw(self.args.seed * 1_000_003 + step, self.args.num_draws)
        try:
            with self.model.of_examples((first + places).repeat(self.rows_per_example).to(self.args.device)):
                yield
        finally:
            self.model.redraw(None)

    def _first_place(self) -> int:
        """The place of this micro-batch's first example among all examples of the optimizer step."""
        step = self.state.global_step
        self._micro_batch = (step, self._micro_batch[1] + 1) if self._micro_batch[0] == step else (step, 0)
        batch = self._micro_batch[1] * self.accelerator.num_processes + self.accelerator.process_index
        return batch * self.args.per_device_train_batch_size

    def joint_forward(self, model: nn.Module, batch: dict[str, Any], alpha: float) -> Routed:
        """The ensemble's forward, in training through the router.

        Args:
            model: the ensemble, or what accelerate wrapped around it.
            batch: arguments of the forward.
            alpha: the order at which the loss of this batch will be taken.
        """
        with self.accelerator.autocast():
            return self.router.forward(batch, alpha, through=model)

    def _measure_scoring(self, inputs: dict[str, Any]) -> None:
        """Measure once how long a scoring pass takes, as a share of the dense step before it."""
        auto = self.router.auto
        if auto.scoring_cost is not None or self.state.global_step < 2 or self.router.plan.kind != "dense":
            return
        began = time.perf_counter()
        with torch.no_grad(), self.compute_loss_context_manager():
            self.model(**{k: v for k, v in self._prepare_inputs(inputs).items() if k in _OF_FORWARD})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        cost = torch.tensor([(time.perf_counter() - began) / self._seconds], device=self.args.device)
        auto.scoring_cost = self.model.gathered(cost).mean().item()  # processes with other members choose alike

    def pair_sums(self, loss: Tensor, routed: Routed, r_ME: Tensor) -> Sums:
        """What is logged about the pairs of a training batch; empty in a dense run.

        Args:
            loss: of the batch, before its backward.
            routed: the forward that the loss was computed from.
            r_ME: responsibilities [M, E].
        """
        if self.args.routing == "dense" or not self.model.training:
            return {}
        # The gradient of the loss with respect to the log-probabilities alone; it does not go through the model.
        (upstream_MBT,) = torch.autograd.grad(loss, routed.output.log_probs, retain_graph=True)
        share_ME = member_shares(upstream_MBT, self.rows_per_example, self.model.gathered)
        plan = self.router.plan
        self.router.auto.observe(share_ME, plan.threshold)
        return pair_sums(share_ME, r_ME, plan, routed.statistics)

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def rehearse(self) -> int:
        """Bytes at the peak of a step on the longest examples, optimizer state included. No weight changes.

        On a GPU the bytes of tensors, on a CPU the bytes of the process. If a step has several parts, only the largest
        is run, beside gradients as an earlier part would have left them.
        """
        self.current_gradient_accumulation_steps = 1  # the training loop sets it, and turns on what follows
        if self.args.activation_checkpointing:
            self.model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs or None)
        parts = self._parts(self.data_collator(self._longest(self.args.per_device_train_batch_size)))
        largest = max(parts, key=lambda part: part["input_ids"].numel())
        batch = {name: value for name, value in largest.items() if name not in (PLACES, SHARE)}
        if "attention_mask" in batch and self._lengths.amin() < self._lengths.amax():
            # The longest rows often have one length and need no mask. Most batches need one, and it takes memory.
            batch["attention_mask"][-1, -1] = 0
        items = self._get_num_items_in_batch([batch], self.args.device)
        # At the end alpha has its final value. While it is 0, members that are drawn are not scored before.
        before, self.state = self.state, TrainerState(global_step=1, max_steps=1)
        try:
            with self.as_trained(), room_for_gradients(self.trained_parameters()):
                self.training_step(self.model, self._prepare_inputs(batch), items)
        finally:
            self.state = before
        self.model.zero_grad(set_to_none=True)
        trained = sum(p.numel() * p.element_size() for p in self.trained_parameters())
        return peak_memory(self.args.device) + 2 * trained  # AdamW keeps two moments

    def _longest(self, many: int) -> list[dict[str, Any]]:
        """The longest rows of the training set."""
        rows: Any = self.train_dataset
        longest = self._lengths.argsort(descending=True)[:many].tolist()
        return [{name: value for name, value in rows[i].items() if name != ROUTED_ROW} for i in longest]

    @cached_property
    def _lengths(self) -> Tensor:
        """The tokens of every row of the training set [N]; of a pair's row those of all its parts."""
        rows: Any = self.train_dataset
        columns = [rows[name] for name in rows.column_names if name.endswith("ids")]
        return torch.tensor([sum(map(len, row)) for row in zip(*columns, strict=True)])


_OF_FORWARD = ("input_ids", "attention_mask", "labels", "position_ids")


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU, or that this process took in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
