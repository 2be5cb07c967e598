"""PowerFlow: unsupervised tuning toward a power of the base distribution (Chen et al. 2026, arXiv 2603.18363).

The one difference from TRL's GRPOTrainer is the loss. It has no reward and no advantage. It is a length-aware
trajectory balance between a policy's log-likelihood of its own rollout and the power of the base's. The base is the
frozen model without its adapters, so there is no second copy. Read next: `renyi.objectives.power` (the loss),
`rollouts.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig

from renyi import data
from renyi.ensemble import BaseScore, LoraEnsemble
from renyi.ensemble.pool import POOLS
from renyi.errors import ConfigError
from renyi.objectives import BALANCES, group_partition, importance_weight, trajectory_balance, trajectory_residual
from renyi.routing import member_sums
from renyi.training.balance import Balance, balance_figures, balance_sums, by_length
from renyi.training.card import Method
from renyi.training.checks import check_rollouts
from renyi.training.config import AUTO, EnsembleConfig, require
from renyi.training.form import Form, form_of
from renyi.training.partition import LearnedPartition
from renyi.training.report import FIGURE_FILE, draw_powerflow
from renyi.training.rollouts import UNTOUCHED, Rollouts, RolloutTrainer, no_reward
from renyi.training.start import as_ensemble
from renyi.training.target import card_of

PARTITIONS = ("group", "learned")
PARTITION_FILE = "partition.safetensors"
_NO_PART = "which has no part in this loss"
# GRPO's settings that would change what is sampled or minimised: the one value that each may have here, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    **{name: (value, "rollouts must be samples of the policy itself") for name, value in UNTOUCHED.items()},
    "beta": (0.0, f"that is the weight of a KL term, {_NO_PART}"),
    "mask_truncated_completions": (False, "truncated completions are trajectories like others"),
    "sync_ref_model": (False, "the reference is frozen"),
    "reward_weights": (None, f"that weighs rewards, {_NO_PART}"),
    "top_entropy_quantile": (1.0, "every token of a trajectory is in the balance"),
    "entropy_coef": (0.0, "an entropy bonus would move the target"),
    "use_adaptive_entropy": (False, "an entropy bonus would move the target"),
    "off_policy_mask_threshold": (None, "every trajectory is in the balance; see epsilon"),
    "delta": (None, "the importance ratio is clipped by epsilon and epsilon_high"),
    "use_transformers_continuous_batching": (False, "it knows no joint members"),
    "member_kind": ("point", "a policy samples and is scored as one adapter"),
    "routing_group": (None, "rollouts are balanced by prompt"),
    "alpha_hold_shared": (False, "policies sample for themselves"),
}  # fmt: skip


@dataclass
class PowerFlowConfig(EnsembleConfig, GRPOConfig):
    """TRL's GRPOConfig plus what PowerFlow needs. Members of the ensemble are policies; by default there is one.

    Sampling is from the policy itself: temperature 1, top-p 1, no dropout; anything else is refused. `epsilon` and
    `epsilon_high` clip the importance ratio of rollouts that are used for several updates.

    Args:
        power: exponent of the target. Above 1 sharpens toward what the base half knows, below 1 flattens; the paper
            takes 4 for base models, 2 for instruction-tuned ones and 0.5 for creative writing.
        balance: "length_aware", the paper's loss; or, for comparison, "trajectory" (plain trajectory balance, by whole
            sequences) and "token_mean" (only the target is averaged over tokens).
        partition: log Z' of a prompt is the mean over its rollouts ("group") or comes from a small head ("learned").
        partition_learning_rate: the learning rate of that head.
        reference: what the target is a power of: "start", the policies as training began (for fresh ones that is the
            base); "base", the frozen base; or the folder of an ensemble on this base.
        reference_pool: how several members make one reference: "arithmetic" (the mixture of sequences), "geometric", or
            "member" (each policy has the reference member of its own number).
        format_penalty: a regular expression that a well-formed completion contains, or `package.module:function` of
            prompt and completion that returns ψ in nats a token; None for no penalty.
        format_penalty_size: the penalty of a completion without a match, in nats a token.
        length_penalty: the penalty of a completion that is cut at `max_completion_length`, in nats a token.
        max_prompt_length: the most tokens of a prompt; a longer one is refused. By default what the model's context
            leaves.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    num_members: int = field(default=1, metadata={"help": "Number of policies, trained jointly on shared rollouts."})
    alpha: float = field(
        default=0.0, metadata={"help": "Rényi order that couples several policies; 0: each fits every rollout."}
    )
    power: float = field(
        default=4.0, metadata={"help": "Exponent of the target: above 1 sharpens the base, below 1 flattens it."}
    )
    balance: str = field(
        default="length_aware",
        metadata={"help": "The loss: length_aware, or another one for comparison.", "choices": list(BALANCES)},
    )
    partition: str = field(
        default="group",
        metadata={
            "help": "Where log Z' of a prompt comes from: group (the mean over its rollouts), or a learned head.",
            "choices": list(PARTITIONS),
        },
    )
    partition_learning_rate: float = field(default=0.01, metadata={"help": "Learning rate of a learned partition."})
    reference: str = field(
        default="start",
        metadata={"help": "What the target is a power of: start, base, or an ensemble's folder."},
    )
    reference_pool: str = field(
        default="arithmetic",
        metadata={"help": "How several reference members become one distribution.", "choices": list(POOLS)},
    )
    format_penalty: str | None = field(
        default=None,
        metadata={"help": "A regular expression that completions should match, or package.module:function."},
    )
    format_penalty_size: float = field(
        default=1.0, metadata={"help": "Penalty of a completion that does not match, in nats a token."}
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Penalty of a completion that is cut at max_completion_length, in nats a token."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "The most tokens of a prompt; a longer one is refused. If unset, what the model can read."},
    )

    def __post_init__(self) -> None:
        check_rollouts(self)
        super().__post_init__()
        for name, (value, why) in _FIXED.items():
            given = getattr(self, name)
            if given != value:
                raise ConfigError(f"{given!r} is not allowed: {why}", where=name, hint=f"Leave it at {value!r}.")
        sampled = set(self.generation_kwargs or {}) - {"use_cache"}
        require("generation_kwargs", sorted(sampled), not sampled, "nothing that changes what is sampled")
        require("alpha", self.alpha, self.alpha != AUTO, "a number: there are no data to diagnose")
        power = self.power
        require("power", power, 0 <= power < math.inf, "a number of at least 0; 1 is the base itself")
        require("balance", self.balance, self.balance in BALANCES, f"one of {', '.join(BALANCES)}")
        require("partition", self.partition, self.partition in PARTITIONS, f"one of {', '.join(PARTITIONS)}")
        require("reference_pool", self.reference_pool, self.reference_pool in POOLS, f"one of {', '.join(POOLS)}")
        sizes = ("format_penalty_size", "length_penalty")
        for name in sizes:
            require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        rate, longest = self.partition_learning_rate, self.max_prompt_length
        require("partition_learning_rate", rate, 0 < rate < math.inf, "a number above 0")
        require("max_prompt_length", longest, longest is None or longest >= 1, "at least 1, or leave it out")
        split = self.member_parallel
        require("member_parallel", split, split == 1, "1: a policy trains on rollouts that others wrote")
        require("shard_base", True, not self.shard_base, "false: rollouts do not all end at once")
        many = self.num_members
        for name in ("num_generations", "num_generations_eval"):
            rollouts = getattr(self, name)
            require(name, rollouts, not rollouts or rollouts % many == 0, f"a multiple of num_members ({many})")
        evaluated = self.num_generations_eval
        compared = self.partition == "learned" or evaluated != 1
        require("num_generations_eval", evaluated, compared, "at least 2: log Z' is the mean over a prompt's rollouts")
        one = not self.use_vllm or many == 1
        require("use_vllm", self.use_vllm, one, "false: vLLM serves one merged policy, and there are several")
        form_of(self.format_penalty, self.format_penalty_size)


class PowerFlowTrainer(RolloutTrainer):
    """Tunes policies toward a power of the base distribution, without labels or rewards.

    Minimises, over a policy's own rollouts y of a prompt q, w · (log Z'(q) + mean_t log π(y_t) − power · [mean_t
    log p_base(y_t) + ψ(y)])², with a detached, clipped importance ratio w (arXiv 2603.18363). The fixed point is
    π*(y|q) = p_base(y|q)^power · e^{power·|y|·ψ} · e^{−λ|y|}, where λ = log Z' makes it sum to one.

    Several policies share their rollouts: each writes its part of them, and each is trained on all of them with the
    ratio to their mixture. With `alpha` above 0 they are coupled by the α-Rényi loss of ℓ_m = −loss_m.

    Args:
        model: a folder, a hub id, a loaded base model, or a `LoraEnsemble` to train further.
        args: a `PowerFlowConfig`.
        train_dataset: a column `prompt`: text, or messages. Other columns are not read.
        peft_config: a `peft.LoraConfig` of the policies, without dropout; rank 16 on all linear layers if not given.
        quantization_config: how to quantise the base when `model` is a name.
        base_score: log-likelihoods [1 or M, B] of trajectories, from (input_ids, attention_mask, labels). It replaces
            what `reference` says.
        kwargs: as for TRL's GRPOTrainer (`eval_dataset`, `processing_class`, `optimizers`), but for rewards and tools.

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is NaN or infinite.
    """

    _tag_names = ["renyi", "lora", "powerflow", "trl"]  # noqa: RUF012 (TRL's own form)
    _name = "PowerFlow"
    unit = "trajectory"
    preparation_class = data.PromptPreparation

    routings = ("dense",)
    splits_batches = False
    args: PowerFlowConfig

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: PowerFlowConfig,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        base_score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ):
        for name in ("reward_funcs", "tools", "environment_factory", "rollout_func"):
            if kwargs.get(name) is not None:
                raise ConfigError("has no part in this loss", where=name, hint="Leave it out.")
        ensemble = as_ensemble(model, args, peft_config, quantization_config)
        if isinstance(model, str) and not ensemble.is_fresh:  # it has the dropout of its earlier training
            ensemble.turn_dropout_off()
        _check_no_dropout(ensemble)
        args.max_prompt_length = args.max_prompt_length or _longest_prompt(ensemble, args.max_completion_length)
        if args.partition == "learned":
            hidden_size = ensemble.config.get_text_config().hidden_size
            ensemble.partition = LearnedPartition(ensemble.num_members, hidden_size).to(ensemble.device)
        kwargs["reward_funcs"] = no_reward
        super().__init__(ensemble, args=args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)
        self.stop_at_ends_of_turns()
        for name, rows in {"train": self.train_dataset, "eval": self.eval_dataset}.items():
            for part, prompts in rows.items() if isinstance(rows, dict) else [(name, rows)]:
                if isinstance(prompts, Dataset):
                    self.preparation_class.of(args).prepare(prompts, self._tokenizer, f"{part} dataset")
        self.base_score = base_score or self._reference(ensemble)
        self._form: Form | None = form_of(args.format_penalty, args.format_penalty_size)
        if args.use_vllm:
            self.send_members_to_vllm()

    def _reference(self, ensemble: LoraEnsemble) -> BaseScore:
        """What `args.reference` stands for; the policies are still as training begins."""
        reference, pool = self.args.reference, self.args.reference_pool
        if reference == "base" or (reference == "start" and ensemble.is_fresh):
            return BaseScore(ensemble)
        members = ensemble.snapshot() if reference == "start" else ensemble.read_snapshot(reference)
        return BaseScore(ensemble, members, pool)

    # ---- The objective -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def score_rollouts(self, rollouts: Rollouts, group_size: int) -> dict[str, Tensor]:
        """For each rollout: log-likelihoods under the base and under the policies that wrote, ψ, and log Z'."""
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        base, policy = [], []
        rows = (rollouts.input_ids, rollouts.attention_mask, rollouts.labels)
        with self.accelerator.autocast():
            for batch in zip(*(r.split(size) for r in rows), strict=True):
                base.append(self.base_score(*batch))
                policy.append(self.model(*batch).log_probs.sum(dim=-1))
        log_base, log_policy_MN = torch.cat(base, dim=1), torch.cat(policy, dim=1)
        members = self.model.num_members
        log_behaviour_N = rollouts.sampled_log_prob
        if log_behaviour_N is None:  # as many of each policy: a sample of their mixture (the balance heuristic)
            log_behaviour_N = torch.logsumexp(log_policy_MN, dim=0) - math.log(members)
        form_N = self._form_penalties(rollouts)
        scored = {
            "input_ids": rollouts.input_ids,
            "attention_mask": rollouts.attention_mask,
            "labels": rollouts.labels,
            "log_base": log_base.T,
            "log_behaviour": log_behaviour_N,
            "penalty": form_N - self.args.length_penalty * rollouts.is_truncated,
            "has_form": form_N >= 0,
        }
        # A prompt's rollouts may lie on several processes, and are shuffled before they are split into batches.
        every = [self.accelerator.gather(x.T.contiguous()) for x in (log_policy_MN, log_base)]
        penalty, tokens = self.accelerator.gather(scored["penalty"]), self.accelerator.gather(rollouts.tokens)
        first = self.accelerator.process_index * len(rollouts.tokens)
        mine = slice(first, first + len(rollouts.tokens))
        for name, log_probs in zip(("policy_by_length", "base_by_length"), every, strict=True):
            scored[name] = by_length(log_probs.T, tokens, group_size).T[mine]
        target = (self.args.power, penalty, self.args.balance)
        if self.args.partition == "group":
            log_partition = group_partition(every[0].T, every[1].T, tokens, group_size, *target)
            scored["log_partition"] = log_partition.T[mine]
            log_partition_MN = scored["log_partition"].T
        else:
            scored["prompt_state"] = self._prompt_states(rollouts)
            residual = trajectory_residual(every[0].T, every[1].T, tokens, 0.0, *target)
            self._partition.start_at(-residual.mean(dim=1))
            log_partition_MN = self._partition(scored["prompt_state"])
        terms = (log_policy_MN, log_base, rollouts.tokens, log_partition_MN, self.args.power, scored["penalty"])
        scored["advantage"] = -trajectory_residual(*terms, self.args.balance).mean(dim=0)
        return scored

    def _form_penalties(self, rollouts: Rollouts) -> Tensor:
        """What each rollout loses for its form [N], nats a token."""
        if self._form is None:
            return torch.zeros(len(rollouts.tokens), device=rollouts.tokens.device)
        given = [self._form(p, c) for p, c in zip(rollouts.prompts, rollouts.completions, strict=True)]
        return torch.tensor(given, device=rollouts.tokens.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The balance of a batch of rollouts: its mean over trajectories."""
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        alpha = self.current_alpha
        batch = {k: inputs[k][:, :longest] for k in ("input_ids", "attention_mask", "labels")}
        output, _ = self.joint_forward(model, batch, alpha)
        log_policy_MB, tokens_B = output.log_probs.sum(dim=-1), output.label_mask.sum(dim=-1)
        learned = self.args.partition == "learned"
        log_partition_MB = self._partition(inputs["prompt_state"]) if learned else inputs["log_partition"].T

        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        ratio = importance_weight(log_policy_MB, inputs["log_behaviour"], low, high)
        terms = (log_policy_MB, inputs["log_base"].T, tokens_B, log_partition_MB, self.args.power, inputs["penalty"])
        loss_MB = trajectory_balance(*terms, self.args.balance, ratio.weight)
        loss_B, r_MB = self.objective.of_examples(-loss_MB, tokens_B, alpha)
        loss = self.minimised(loss_B.mean(), -loss_MB, r_MB, inputs, num_items_in_batch)

        with torch.no_grad():
            watched = Balance(
                log_policy=log_policy_MB,
                log_base=inputs["log_base"].T,
                tokens=tokens_B,
                log_partition=log_partition_MB,
                residual=trajectory_residual(*terms, self.args.balance),
                is_clipped=ratio.is_clipped,
                entropy=output.entropy.sum(dim=-1),
                weights=self.model.weights,
                base_by_length=inputs["base_by_length"].T,
                policy_by_length=inputs["policy_by_length"].T,
            )
            rows = loss_B.new_tensor(len(tokens_B))
            sums = {**balance_sums(watched), **member_sums(r_MB)}
            if self._form is not None:
                sums["format_rate"] = (inputs["has_form"].sum(), rows)
            self.watch(sums, inputs)
        return loss

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        return balance_figures(means)

    def draw(self, file: Path | None = None) -> None:
        if self.is_world_process_zero():
            file = file or self.output_dir / FIGURE_FILE
            draw_powerflow(self.state.log_history, self.output_dir.name, file, self.args.power)

    # ---- A learned partition ---------------------------------------------------------------------------------------

    @property
    def _partition(self) -> LearnedPartition:
        partition = self.model.partition
        assert isinstance(partition, LearnedPartition)
        return partition

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the policies. The prior acts on them, and not on the head of log Z'."""
        own = set(self._partition.parameters()) if self.args.partition == "learned" else set()
        return [p for p in super().trained_parameters() if p not in own]

    def _prompt_states(self, rollouts: Rollouts) -> Tensor:
        """The base's last hidden state [N, D], float32, averaged over each prompt's tokens."""
        longest = int(rollouts.prompt_tokens.max())
        at_BT = torch.arange(longest, device=rollouts.tokens.device) < rollouts.prompt_tokens[:, None]
        ids, states = rollouts.input_ids[:, :longest], []
        size = self.args.per_device_train_batch_size
        with self.model.using(()), self.accelerator.autocast():
            for part, at in zip(ids.split(size), at_BT.split(size), strict=True):
                states.append((self.model.hidden_states(part, at.long())[0].float() * at[..., None]).sum(dim=1))
        return torch.cat(states) / rollouts.prompt_tokens[:, None]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of transformers, with a group of its own, and a learning rate, for a learned partition."""
        is_new = self.optimizer is None  # a trainer that trains again keeps its optimizer
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.partition == "learned":
            own = set(self._partition.parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p not in own]
            rate = self.args.partition_learning_rate
            optimizer.add_param_group({"params": list(own), "lr": rate, "weight_decay": 0.0})
        return optimizer

    # ---- Files -------------------------------------------------------------------------------------------------

    def method_card(self) -> Method:
        return card_of(self.args, self.base_score)

    def loss_units(self) -> int:
        prompts: Any = self.train_dataset
        if not isinstance(prompts, Dataset):
            raise ConfigError("the number of streamed prompts is unknown", where="prior_std", hint="Leave it out.")
        return len(prompts) * (self.args.num_generations or 1)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.output_dir)
            self.preparation_class.of(self.args).write(folder)
            if self.args.partition == "learned":
                save_file(self._partition.state_dict(), folder / PARTITION_FILE)

    def _restore_members(self, checkpoint: str) -> None:
        super()._restore_members(checkpoint)
        if self.args.partition == "learned":
            self._partition.load_state_dict(load_file(Path(checkpoint) / PARTITION_FILE))


def _check_no_dropout(ensemble: LoraEnsemble) -> None:
    """Raise `ConfigError` if what is scored would not be what was sampled."""
    dropout = {"lora_dropout": ensemble.peft_config.lora_dropout}
    config = ensemble.config.get_text_config().to_dict()
    elsewhere = ("summary_", "classifier_")  # dropout of heads that a language model does not have
    dropout |= {
        name: probability
        for name, probability in config.items()
        if name.endswith(("dropout", "pdrop")) and not name.startswith(elsewhere) and isinstance(probability, float)
    }
    dropout |= {name: module.p for name, module in ensemble.base.named_modules() if isinstance(module, nn.Dropout)}
    for name, probability in dropout.items():
        if probability > 0:
            raise ConfigError(
                f"{probability} is not allowed: a policy that drops at random is not the one that wrote the rollouts, "
                "and at power 1 its loss would not be zero",
                where=name,
                hint="Set it to 0; of a base, with model_init_kwargs (for example attention_dropout: 0).",
            )


def _longest_prompt(ensemble: LoraEnsemble, max_completion_length: int | None) -> int | None:
    """Tokens that the model's context leaves for a prompt; None if it says no limit."""
    context = getattr(ensemble.config.get_text_config(), "max_position_embeddings", None)
    if context is None or max_completion_length is None:
        return None
    if context <= max_completion_length:
        raise ConfigError(
            f"{max_completion_length} tokens leave no room for a prompt: the model reads {context}",
            where="max_completion_length",
            hint="Give fewer.",
        )
    return int(context - max_completion_length)
