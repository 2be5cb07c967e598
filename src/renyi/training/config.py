"""The settings that every ensemble trainer adds to its TRL config, and the checks of their values.

`EnsembleConfig` is mixed in before a TRL config. Read next: `sft.py`, which has the shortest such config.
"""

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.utils import is_torch_bf16_gpu_available

from renyi.errors import ConfigError
from renyi.members import kind_of
from renyi.objectives.mixture import QUANTITIES
from renyi.routing import ROUTINGS
from renyi.training.checks import check_numbers, check_packages, check_precision, check_scheduler

AUTO = "auto"
LANGEVIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # their preconditioners are known
_BeforeConfig: Any = object  # a TRL config comes next in the order of bases; mypy cannot know that


@dataclass
class EnsembleConfig(_BeforeConfig):
    """What an ensemble needs besides a TRL config.

    Args:
        num_members: M, adapters in the ensemble.
        member_parallel: processes that members are split over; 1 keeps all of them in every process. It divides
            num_members and the number of processes that torchrun or accelerate started. Processes that hold the same
            members split the examples between them. Results are those of one process.
        shard_base: split the frozen base, block by block, over the processes that examples are split over (FSDP2).
            For a base that one device cannot hold. Adapters stay whole.
        alpha: Rényi order of the objective. 0: every member fits everything; 1: the mixture fits the data. The command
            line also takes "auto": it fits one adapter and chooses alpha by its curvature (`renyi.runs.auto`).
        alpha_hold_ratio: share of training with alpha 0, in which members learn what the data agree on.
        alpha_ramp_ratio: share of training after the hold in which alpha rises to its value.
        alpha_hold_shared: whether members begin as one adapter, which is trained for all of them while alpha is 0. That
            costs as much as a single adapter. Draws of sampled or raced routing part the members afterwards.
        routing_quantity: what is routed: the log-likelihood of a whole example ("sequence"), or its mean per trained
            token ("length_normalised"). The mean routes long examples as softly as short ones. Or every token by itself
            ("token", dense only): one α-loss a token, which goes with mixture="token" at decoding.
        routing: which pairs of members and examples are trained. "dense": all. "sampled": one member for each example,
            drawn by its responsibility, so that gradients are unbiased. "sparse": pairs whose responsibility reaches
            `routing_threshold`, or all while most do. "raced": as "sampled", but a member that falls behind in an
            example is not scored to its end. "auto": "sparse" where it pays. The log says what was left out.
        routing_group: a column of the rows, such as the annotator or the document, whose rows share one responsibility:
            that of their summed log-likelihood. Batches keep the rows of a group together. For a group larger than a
            batch, the other rows count as they were when they were last run. None: every row has its own.
        routing_threshold: the responsibility below which "sparse" leaves out a pair and "raced" stops scoring a member.
        token_budget: most tokens of one forward and backward pass, over all members, padding counted. A larger batch
            is run in parts, with the same gradients, so that memory does not grow with the members. The default is
            4,096 on a CPU. Elsewhere it is what one member's batch may hold, at least 8,192.
        mixture_weights: "uniform", or "learned" by expectation–maximisation, so that a member nobody needs loses its
            vote.
        mixture_weights_rate: how far learned weights move towards the member loads in one optimizer step.
        prior_std: σ of a Gaussian prior around each member's initial values, per parameter; None for no prior.
        kl_warmup_ratio: share of training in which the weight of the prior rises from 0 to its full value.
        member_kind: what a member is: "point", one adapter; a distribution over adapters, "gaussian" or
            "walsh_hadamard"; or "langevin", a sample. See `renyi.members`.
        num_draws: S, draws of each member in a step. A step costs as much as one with M·S points.
        initial_std: standard deviation of the entries of a random member's A at the start.
        langevin_temperature: T of members of the kind "langevin", whose steps add noise of variance 2 η T.
        keep_snapshots: how often members of that kind are saved in the second half of training. The result has these
            as further members.
        std_learning_rate: learning rate of log σ, the logarithms of the standard deviations that members learn.
        bf16_if_it_pays: not a key: whether `bf16` was not given, so that the trainer decides.
        gradient_checkpointing: run blocks again in the backward instead of keeping what they computed. None: on, as in
            TRL, but on a CPU that has room for one pass's activations.
        checkpoints_if_needed: not a key: whether `gradient_checkpointing` was not given, so that the trainer decides.
        torch_compile: compile the base's blocks. None: where a long run on a CPU earns it back.
        compiles_if_it_pays: not a key: whether `torch_compile` was not given, so that the trainer decides.
        compile_blocks: not a key: backend and mode of compiled blocks; None if blocks are not compiled.
        early_stopping_patience: stop after this many evaluations without a better `metric_for_best_model`.
    """

    num_members: int = field(default=4, metadata={"help": "Number of adapters in the ensemble (M)."})
    member_parallel: int = field(
        default=1, metadata={"help": "Processes to split the members over; examples are split over the rest."}
    )
    shard_base: bool = field(
        default=False, metadata={"help": "Split the frozen base over the processes that examples are split over."}
    )
    alpha: float | str = field(
        default=0.8,
        metadata={"help": "Rényi order: 0 every member fits everything, 1 the mixture fits the data; or auto."},
    )
    alpha_hold_ratio: float = field(
        default=0.2, metadata={"help": "Share of training with alpha 0, before members part."}
    )
    alpha_ramp_ratio: float = field(
        default=0.2, metadata={"help": "Share of training after that in which alpha rises to its value."}
    )
    alpha_hold_shared: bool = field(
        default=False,
        metadata={"help": "Train one adapter for all members while alpha is 0; with sampled or raced routing."},
    )
    routing_quantity: str = field(
        default="sequence",
        metadata={
            "help": "What is routed: the log-likelihood of an example, its mean per trained token, or every token.",
            "choices": list(QUANTITIES),
        },
    )
    routing: str = field(
        default="dense",
        metadata={
            "help": "Which pairs of members and examples are trained: all (dense), or fewer.",
            "choices": list(ROUTINGS),
        },
    )
    routing_group: str | None = field(
        default=None,
        metadata={"help": "A column, such as annotator: its rows of one value share one responsibility."},
    )
    routing_threshold: float = field(
        default=0.01, metadata={"help": "Responsibility below which sparse and raced routing leave a pair out."}
    )
    token_budget: int | None = field(
        default=None,
        metadata={"help": "The most tokens of a pass, over all members; by default what one member's batch may hold."},
    )
    mixture_weights: str = field(
        default="uniform",
        metadata={
            "help": "Mixture weights of the members: uniform, or learned from their loads.",
            "choices": ["uniform", "learned"],
        },
    )
    mixture_weights_rate: float = field(
        default=0.02, metadata={"help": "How far learned mixture weights move towards the loads in one step."}
    )
    prior_std: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of a Gaussian prior around each member's initial values; no prior if unset."
        },
    )
    kl_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of training in which the prior's weight rises from 0 to 1."}
    )
    member_kind: str = field(
        default="point",
        metadata={"help": "What a member is: one adapter (point), or gaussian, walsh_hadamard, langevin."},
    )
    num_draws: int = field(default=1, metadata={"help": "Draws of each member in a step (S); 1 for points."})
    initial_std: float | None = field(
        default=None, metadata={"help": "Standard deviation of a random member's A at the start; 0.01 if unset."}
    )
    langevin_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of langevin members; 0 moves them by the gradient alone."}
    )
    keep_snapshots: int = field(
        default=0,
        metadata={"help": "How many sets of langevin members from the second half of training to keep as well."},
    )
    std_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the logarithms of random members' standard deviations."}
    )
    bf16_if_it_pays: bool = field(
        default=False, init=False, metadata={"help": "Whether bf16 was left open, for the trainer to decide."}
    )
    if not TYPE_CHECKING:  # for a type checker they are the fields of transformers and TRL, whose types differ
        gradient_checkpointing: bool = field(
            default=None,
            metadata={
                "help": "Run blocks again in the backward to save memory; by default unless a CPU has room without.",
                "nargs": "?",
                "const": True,
            },
        )
        torch_compile: bool = field(
            default=None,
            metadata={
                "help": "Compile the base's blocks; by default where a long run on a CPU earns it back.",
                "nargs": "?",
                "const": True,
            },
        )
    checkpoints_if_needed: bool = field(
        default=False, init=False, metadata={"help": "Whether gradient_checkpointing was left open."}
    )
    compiles_if_it_pays: bool = field(
        default=False, init=False, metadata={"help": "Whether torch_compile was left open."}
    )
    compile_blocks: dict[str, Any] | None = field(
        default=None, init=False, metadata={"help": "Backend and mode of compiled blocks."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric_for_best_model."},
    )

    def __post_init__(self) -> None:
        args: Any = self  # with the fields of the TRL config
        _check_sizes(args)
        if args.bf16 is None and (args.use_cpu or not is_torch_bf16_gpu_available()):
            args.bf16 = False  # TRL turns it on, also where transformers refuses it or where it is slow
            self.bf16_if_it_pays = True  # the trainer, which knows the model, may turn it on
        if args.gradient_checkpointing is None and args.activation_checkpointing is None:
            args.gradient_checkpointing = self.checkpoints_if_needed = True
        if self.early_stopping_patience is not None and args.metric_for_best_model is None:
            args.metric_for_best_model = "loss"
        if args.greater_is_better is None and "nll" in (args.metric_for_best_model or ""):
            args.greater_is_better = False  # transformers takes a higher value as better unless its name ends in "loss"
        # transformers would compile the ensemble whole, anew for every shape; the trainer compiles its blocks.
        if args.torch_compile or args.torch_compile_backend or args.torch_compile_mode:
            self.compile_blocks = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
        self.compiles_if_it_pays = self.compile_blocks is None and args.torch_compile is None
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        check_numbers(self)
        check_precision(self)
        super().__post_init__()
        check_scheduler(self)
        check_packages(self)
        require("num_members", self.num_members, self.num_members >= 1, "at least 1")
        split, processes = self.member_parallel, args.world_size
        launched = int(os.environ.get("WORLD_SIZE", 1))
        require("use_cpu", args.use_cpu, processes == launched, f"true: {launched} processes were started without GPUs")
        plain = split == 1 or "8bit" not in args.optim
        require("optim", str(args.optim), plain, "one without 8-bit state, which cannot be split by member")
        is_divisor = split >= 1 and processes % split == 0
        started = f"{processes}; torchrun and accelerate launch start several"
        require("member_parallel", split, is_divisor, f"a divisor of the number of processes ({started})")
        require("fp16", args.fp16, split == 1 or not args.fp16, "bf16: the scale of fp16 would differ between members")
        alone = self.data_processes == 1
        require("shard_base", True, not (self.shard_base and alone), "false: no two processes have other examples")
        is_order = isinstance(self.alpha, float | int) and 0 <= self.alpha <= 1
        require("alpha", self.alpha, is_order or self.alpha == AUTO, f"a number between 0 and 1, or {AUTO}")
        hold, ramp = self.alpha_hold_ratio, self.alpha_ramp_ratio
        require("alpha_hold_ratio", hold, 0 <= hold <= 1, "a share between 0 and 1")
        require(
            "alpha_ramp_ratio",
            ramp,
            ramp >= 0 and hold + ramp <= 1 + 1e-9,  # 1 - 0.9 is less than 0.1
            f"a share between 0 and {1 - hold:g}, what the hold leaves",
        )
        if self.alpha_hold_shared:
            self._check_shared_hold()
        quantity, weights = self.routing_quantity, ("uniform", "learned")
        require("routing_quantity", quantity, quantity in QUANTITIES, f"one of {QUANTITIES}")
        whole = quantity != "token" or self.routing == "dense"
        require("routing", self.routing, whole, "'dense' with routing_quantity: token, which leaves no pairs out")
        require("mixture_weights", self.mixture_weights, self.mixture_weights in weights, f"one of {weights}")
        require("routing", self.routing, self.routing in ROUTINGS, f"one of {ROUTINGS}")
        if self.routing_group is not None:
            self._check_groups()
        fair = 1 / (self.num_members * max(1, self.num_draws))
        threshold, budget = self.routing_threshold, self.token_budget
        goes_by_it = self.routing in ("sparse", "raced", "auto")
        allowed = 0 <= threshold < (fair if goes_by_it else 1)
        require("routing_threshold", threshold, allowed, f"a share from 0 to below a fair one, {fair:g}")
        require("token_budget", budget, budget is None or budget >= 1, "at least 1, or leave it out")
        equally_often = not self.shard_base or self.routing == "dense"
        require("routing", self.routing, equally_often, "'dense' where the base is split over processes")
        unasked = budget is None or not self.shard_base
        require("token_budget", budget, unasked, "none: processes that share the base run it equally often")
        again = self.recomputes_reentrantly
        plain = not again or (self.routing == "dense" and budget is None)
        expected = "use_reentrant: false, or neither routing nor token_budget"
        require("gradient_checkpointing_kwargs", {"use_reentrant": again}, plain, expected)
        rate, std = self.mixture_weights_rate, self.prior_std
        require("mixture_weights_rate", rate, 0 < rate <= 1, "a number above 0 and at most 1")
        require("prior_std", std, std is None or 0 < std < math.inf, "above 0, or unset")
        self._check_kind()
        patience, evaluates = self.early_stopping_patience, args.eval_strategy != "no"
        require("early_stopping_patience", patience, patience is None or patience >= 1, "at least 1, or leave it out")
        require(
            "early_stopping_patience", patience, patience is None or evaluates, "an eval_strategy too: steps or epoch"
        )
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every adapter takes part in every step

    def _check_kind(self) -> None:
        start, rate, warmup = self.initial_std, self.std_learning_rate, self.kl_warmup_ratio
        kind_of(self.member_kind)
        chosen = self.alpha == AUTO and self.member_kind != "point"
        require("alpha", self.alpha, not chosen, "a number; auto is for points, whose curvature it measures")
        require("num_draws", self.num_draws, self.num_draws >= 1, "at least 1")
        require("initial_std", start, start is None or 0 <= start < math.inf, "a number of at least 0, or leave it out")
        require("std_learning_rate", rate, 0 <= rate < math.inf, "a number of at least 0")
        heat, snapshots, moves = self.langevin_temperature, self.keep_snapshots, self.member_kind == "langevin"
        require("langevin_temperature", heat, 0 <= heat < math.inf, "a number of at least 0")
        require("keep_snapshots", snapshots, snapshots >= 0, "at least 0")
        require("keep_snapshots", snapshots, moves or not snapshots, "it with member_kind: langevin")
        whole = self.member_parallel == 1 or not snapshots
        require("keep_snapshots", snapshots, whole, "none where members are split over processes")
        optimizer = str(getattr(self.optim, "value", self.optim))
        require("optim", optimizer, not moves or optimizer in LANGEVIN_OPTIMIZERS, f"one of {LANGEVIN_OPTIMIZERS}")
        require("kl_warmup_ratio", warmup, 0 <= warmup <= 1, "a share between 0 and 1")
        require("kl_warmup_ratio", warmup, not warmup or self.prior_std is not None, "0, or a prior_std as well")

    def _check_shared_hold(self) -> None:
        """Raise `ConfigError` about a setting that does not go with `alpha_hold_shared`."""
        beside = "beside alpha_hold_shared"
        draws = self.routing in ("sampled", "raced")
        require("routing", self.routing, draws, f"'sampled' or 'raced' {beside}: equal members are parted by draws")
        require("alpha", self.alpha, self.alpha != 0, f"a number above 0 {beside}: at 0 members would stay equal")
        require("alpha_hold_ratio", self.alpha_hold_ratio, self.alpha_hold_ratio > 0, f"a share above 0 {beside}")
        require("member_kind", self.member_kind, self.member_kind == "point", f"'point' {beside}")
        require("member_parallel", self.member_parallel, self.member_parallel == 1, f"1 {beside}")

    def _check_groups(self) -> None:
        """Raise `ConfigError` about a setting that does not go with `routing_group`."""
        args: Any = self
        group, beside = self.routing_group, "beside routing_group"
        require("routing_group", group, bool(group), "the name of a column, or leave it out")
        by_row = f"'sequence' {beside}: a group's log-likelihood is a sum"
        require("routing_quantity", self.routing_quantity, self.routing_quantity == "sequence", by_row)
        whole = f"another one {beside}: a member falls behind in a row, and the group decides"
        require("routing", self.routing, self.routing != "raced", whole)
        points = f"'point' {beside}: what is kept of other rows would be of other draws"
        require("member_kind", self.member_kind, self.member_kind == "point", points)
        default = type(args).__dataclass_fields__["train_sampling_strategy"].default
        plain, order = f"{default!r} {beside}: batches are made of whole groups", args.train_sampling_strategy
        require("train_sampling_strategy", order, order == default, plain)
        alone = "it to one process: a group's rows would be in several"
        require("routing_group", group, args.world_size == 1, alone)

    @property
    def recomputes_reentrantly(self) -> bool:
        """Whether gradient checkpointing uses `use_reentrant`. Such a rerun of a block cannot tell members apart."""
        args: Any = self
        return args.gradient_checkpointing and bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))

    @property
    def data_processes(self) -> int:
        """Processes that the examples of a step are split over."""
        args: Any = self
        return int(args.world_size) // self.member_parallel


# The least value of each setting that counts something. Libraries read a negative count in ways of their own, or fail.
_LEAST = {
    "max_length": 1,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "num_generations": 1,
    "num_iterations": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "precompute_ref_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "pad_to_multiple_of": 1,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}


def _check_sizes(args: Any) -> None:
    """Raise `ConfigError` for a count that is too small, or that is not a number."""
    for key, least in _LEAST.items():
        value = getattr(args, key, None)
        if isinstance(value, int | float):
            require(key, value, least <= value < math.inf, f"a number of at least {least}")
    for what in ("logging", "save", "eval"):
        key, strategy = f"{what}_steps", getattr(args, f"{what}_strategy")
        value = getattr(args, key)
        if value is not None and getattr(strategy, "value", strategy) == "steps":
            require(key, value, 0 < value < math.inf, "a number of steps, or a share of them below 1")
    steps, epochs = args.max_steps, args.num_train_epochs
    require("max_steps", steps, steps == -1 or steps >= 1, "at least 1, or leave it out")
    require("num_train_epochs", epochs, steps >= 1 or 0 < epochs < math.inf, "a number above 0, or max_steps")


def require(key: str, value: object, holds: bool, expected: str) -> None:
    """Raise `ConfigError` about a setting unless a condition on its value holds."""
    if not holds:
        raise ConfigError(f"{value!r} is not allowed", where=key, hint=f"Give {expected}.")
