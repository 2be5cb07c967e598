"""Supervised fine-tuning of an ensemble with the α-Rényi loss.

The one difference from TRL's SFTTrainer is `compute_loss`: a joint forward gives each example's log-likelihood under
every member, and the objective is the Rényi loss of those. Datasets, templates, masks, packing, evaluation and the
loop are TRL's; what any ensemble trainer changes in the loop stands in `trainer.py`.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from renyi import data
from renyi.ensemble import JointOutput, LoraEnsemble, example_log_likelihood
from renyi.errors import ConfigError, DataError, TrainingDivergedError
from renyi.objectives import renyi_loss, responsibilities
from renyi.training.schedule import scheduled_alpha
from renyi.training.trainer import EnsembleTrainer, LearnMixtureWeights, scale_gradient, squared_distance


@dataclass
class RenyiSFTConfig(SFTConfig):
    """TRL's SFTConfig plus what an ensemble needs.

    `learning_rate` defaults to 2e-4, ten times TRL's, because only adapters are trained.

    Args:
        num_members: M, adapters in the ensemble.
        alpha: Rényi order of the objective. 0: every member fits everything; 1: the mixture fits the data.
        alpha_hold_ratio: share of training with alpha 0, in which members learn what the data agree on.
        alpha_ramp_ratio: share of training in which alpha then rises to its value.
        routing_quantity: what is routed: the log-likelihood of a whole example ("sequence"), or its mean per trained
            token ("length_normalised"), which routes long examples as softly as short ones.
        mixture_weights: "uniform", or "learned" by expectation–maximisation, so that a member nobody needs loses its
            vote.
        mixture_weights_rate: how far learned weights move towards the member loads in one optimizer step.
        prior_std: σ of a Gaussian prior around each member's initial values, per parameter; None for no prior.
        early_stopping_patience: stop after this many evaluations without a better `metric_for_best_model`.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate for AdamW."})
    num_members: int = field(default=4, metadata={"help": "Number of adapters in the ensemble (M)."})
    alpha: float = field(
        default=0.8,
        metadata={"help": "Rényi order of the objective: 0 every member fits everything, 1 the mixture fits the data."},
    )
    alpha_hold_ratio: float = field(
        default=0.2, metadata={"help": "Share of training with alpha 0, before members part."}
    )
    alpha_ramp_ratio: float = field(
        default=0.2, metadata={"help": "Share of training in which alpha then rises to its value."}
    )
    routing_quantity: str = field(
        default="sequence",
        metadata={
            "help": "What is routed: the log-likelihood of a whole example, or its mean per trained token.",
            "choices": ["sequence", "length_normalised"],
        },
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
        metadata={"help": "Standard deviation of a Gaussian prior around each member's initial values; none if unset."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric_for_best_model."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not (self.use_cpu or is_torch_bf16_gpu_available()):
            self.bf16 = False  # TRL turns it on, which transformers then refuses on such a machine
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and "nll" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers takes whatever is not called a loss for a gain
        super().__post_init__()
        _require("num_members", self.num_members, self.num_members >= 1, "at least 1")
        _require("alpha", self.alpha, 0 <= self.alpha <= 1, "a number between 0 and 1")
        hold, ramp = self.alpha_hold_ratio, self.alpha_ramp_ratio
        _require("alpha_hold_ratio", hold, 0 <= hold <= 1, "a share between 0 and 1")
        _require(
            "alpha_ramp_ratio",
            ramp,
            ramp >= 0 and hold + ramp <= 1 + 1e-9,  # 1 - 0.9 is less than 0.1
            f"a share between 0 and {1 - hold:g}, what the hold leaves",
        )
        quantities, weights = ("sequence", "length_normalised"), ("uniform", "learned")
        _require(
            "routing_quantity",
            self.routing_quantity,
            self.routing_quantity in quantities,
            f"one of {quantities}",
        )
        _require("mixture_weights", self.mixture_weights, self.mixture_weights in weights, f"one of {weights}")
        rate = self.mixture_weights_rate
        _require("mixture_weights_rate", rate, 0 < rate <= 1, "a number above 0 and at most 1")
        _require(
            "prior_std",
            self.prior_std,
            self.prior_std is None or 0 < self.prior_std < math.inf,
            "above 0, or unset",
        )
        _require(
            "loss_type",
            self.loss_type,
            self.loss_type == "nll",
            "'nll': the routed quantity is a log-likelihood",
        )
        smoothing = self.label_smoothing_factor
        _require("label_smoothing_factor", smoothing, smoothing == 0, "0: the routed quantity is a log-likelihood")
        wrapped = self.packing and self.packing_strategy == "wrapped"
        _require(
            "packing_strategy",
            self.packing_strategy,
            not wrapped,
            "'bfd': 'wrapped' loses where examples begin",
        )
        patience, evaluates = self.early_stopping_patience, self.eval_strategy != "no"
        _require("early_stopping_patience", patience, patience is None or patience >= 1, "at least 1, or leave it out")
        _require(
            "early_stopping_patience", patience, patience is None or evaluates, "an eval_strategy too: steps or epoch"
        )
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter takes part in every step


def _require(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{value!r} is not allowed", where=key, hint=f"Give {expected}.")


class RenyiSFTTrainer(EnsembleTrainer, SFTTrainer):
    """TRL's SFTTrainer for an ensemble of LoRA adapters coupled by the α-Rényi loss.

    Minimises `Σ_i −(1/α) log Σ_m π_m p_m(y_i | x_i)^α` per trained token ("Soft Specialists", arXiv 2605.27747,
    with α scheduled from 0). Gradients are M times those of the reported loss, because responsibilities sum to one:
    a learning rate means what it means for a single adapter, and α = 0 is exactly M independent runs.

    Args:
        model: a folder, a hub id, a loaded base model, or a `LoraEnsemble` to go on training.
        args: a `RenyiSFTConfig`.
        train_dataset: as for TRL: `text`, `messages`, `prompt` + `completion`, ShareGPT `conversations`, or tokenised.
        peft_config: a `peft.LoraConfig` for the members; rank 16 on all linear layers if not given.
        quantization_config: how to quantise the base when `model` is a name.
        kwargs: as for TRL's SFTTrainer (`eval_dataset`, `processing_class`, `callbacks`, `data_collator`,
            `optimizers`, `formatting_func`, …).

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is no number any more.
    """

    _tag_names = ["renyi", "lora", "ensemble", "sft", "trl"]  # noqa: RUF012 (TRL's own form)
    _name = "Rényi SFT"

    args: RenyiSFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: RenyiSFTConfig,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        for unsupported in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(unsupported) is not None:
                raise ConfigError(f"{unsupported} needs logits, which are never built", hint="Leave it out.")
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise DataError("the dataset is empty", where="train dataset", hint="A dataset needs at least one row.")
        train_dataset = data.with_messages(train_dataset, "train dataset")
        held_out = kwargs.get("eval_dataset")
        if isinstance(held_out, dict):
            kwargs["eval_dataset"] = {k: data.with_messages(v, f"{k} dataset") for k, v in held_out.items()}
        elif held_out is not None:
            kwargs["eval_dataset"] = data.with_messages(held_out, "eval dataset")
        if args.early_stopping_patience is not None:
            callbacks = [*(callbacks or []), EarlyStoppingCallback(args.early_stopping_patience)]
        ensemble = _as_ensemble(model, args, peft_config, quantization_config)
        ensemble.alpha, ensemble.routing_quantity = args.alpha, args.routing_quantity
        super().__init__(model=ensemble, args=args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)

        self._learned_weights: LearnMixtureWeights | None = None
        if args.mixture_weights == "learned":
            self._learned_weights = LearnMixtureWeights(self, args.mixture_weights_rate)
            self.add_callback(self._learned_weights)
        if args.prior_std is not None:
            self._prior_tokens = data.count_tokens(self.train_dataset).trained
            self._origins = [p.detach().clone() for p in self.trained_parameters()]

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def current_alpha(self) -> float:
        """The order in force: the schedule's while training, the final one in evaluation."""
        return self._scheduled_alpha if self.model.training else self.args.alpha

    @property
    def _scheduled_alpha(self) -> float:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return scheduled_alpha(progress, self.args.alpha, self.args.alpha_hold_ratio, self.args.alpha_ramp_ratio)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The α-Rényi loss of a TRL batch, in nats per trained token."""
        output: JointOutput = model(**inputs)
        ell_ME, tokens_E = example_log_likelihood(output, inputs.get("position_ids"))
        log_weights = self.model.weights.log()
        alpha = self.current_alpha

        routed_E = tokens_E if self.args.routing_quantity == "length_normalised" else torch.ones_like(tokens_E)
        loss_E = routed_E * renyi_loss(ell_ME / routed_E, alpha, log_weights)
        r_ME = responsibilities(ell_ME.detach() / routed_E, alpha, log_weights)

        num_tokens = tokens_E.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss_E.sum() / num_tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the tokens are everyone's, and DDP averages gradients
        if self.model.training:
            loss = loss + self._prior(num_items_in_batch)
            if self._learned_weights is not None:
                self._learned_weights.add(r_ME)
        if not math.isfinite(loss.item()):
            raise self._diverged(inputs, ell_ME)
        self._count(inputs, output, ell_ME.detach(), tokens_E, r_ME, log_weights)
        return scale_gradient(loss, self.model.num_members)

    def _prior(self, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """The prior's part of a micro-batch: (1/M) Σ_m ‖φ_m − φ_m⁰‖² / 2σ², spread over the dataset's tokens."""
        if self.args.prior_std is None:
            return 0.0
        distance = squared_distance(self.trained_parameters(), self._origins)
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return distance / (2 * self.args.prior_std**2 * self.model.num_members * self._prior_tokens * steps)

    def _count(
        self,
        inputs: dict[str, Any],
        output: JointOutput,
        ell_ME: Tensor,
        tokens_E: Tensor,
        r_ME: Tensor,
        log_weights: Tensor,
    ) -> None:
        mode = "train" if self.model.training else "eval"
        self._routing[mode].add(
            ell_ME,
            r_ME,
            tokens_E,
            log_weights,
            entropy=output.entropy.detach().sum(),
            correct=output.is_top1.sum(),
        )
        if mode == "train":
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            seen = torch.as_tensor(seen, device=self.args.device)
            self._total_train_tokens += int(self.accelerator.reduce(seen).item())

    def _diverged(self, inputs: dict[str, Any], ell_ME: Tensor) -> TrainingDivergedError:
        bad_M = (~ell_ME.isfinite()).any(dim=1).nonzero().flatten().tolist()
        tokenizer: Any = self.processing_class
        text = tokenizer.decode(inputs["input_ids"][0][:24].tolist())
        return TrainingDivergedError(
            f"the loss is not a finite number (members {bad_M or 'none by themselves'})",
            where=f"step {self.state.global_step + 1}, batch of {len(inputs['input_ids'])} starting {text!r}",
            hint="Lower learning_rate, or set max_grad_norm; earlier checkpoints are untouched.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs["alpha"] = self._scheduled_alpha
            logs["num_tokens"] = self._total_train_tokens
            if self._learned_weights is not None:
                logs.update({f"mixture_weight/{m}": w for m, w in enumerate(self.model.weights.tolist())})
        super().log(logs, start_time)

    def _prepare_dataset(  # type: ignore[override]
        self,
        dataset: Any,
        processing_class: Any,
        args: RenyiSFTConfig,
        packing: bool,
        formatting_func: Any,
        name: str,
    ) -> Any:
        """TRL's preparation, but a row that leaves nothing to train on is an error, where TRL drops it in silence."""
        trl = super()._prepare_dataset
        if not isinstance(dataset, Dataset):
            return trl(dataset, processing_class, args, packing, formatting_func, name)
        # First without packing, which forgets rows, and without shuffling, which TRL does before it packs.
        plain_args = copy.copy(args)
        plain_args.shuffle_dataset = args.shuffle_dataset and not packing
        if packing and args.packing_strategy == "bfd_split":
            plain_args.max_length = None  # long examples are split, not cut
        prepared = data.checked(
            dataset,
            self._tokenizer,
            data.Preparation.of(plain_args),
            f"{name} dataset",
            lambda rows: trl(rows, processing_class, plain_args, False, formatting_func, name),
            well_formed=formatting_func is not None,
        )
        if packing:
            prepared = trl(prepared, processing_class, args, True, None, name)
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            data.Preparation.of(self.args).write(Path(output_dir or self.output_dir))


def _as_ensemble(
    model: str | PreTrainedModel | LoraEnsemble,
    args: RenyiSFTConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
) -> LoraEnsemble:
    if isinstance(model, LoraEnsemble):
        if peft_config is not None or model.num_members != args.num_members:
            raise ConfigError(
                f"the ensemble has {model.num_members} members of its own config",
                where="model",
                hint=f"Leave out peft_config and set num_members={model.num_members}.",
            )
        return model
    set_seed(args.seed)
    if isinstance(model, str):
        assert not isinstance(args.model_init_kwargs, str)  # parsed by TrainingArguments
        init = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        if args.distributed_state is not None and args.distributed_state.distributed_type == "MULTI_GPU":
            init["device_map"] = None
        init.setdefault("trust_remote_code", args.trust_remote_code)
        model = create_model_from_path(model, **init)
    if peft_config is None:
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return LoraEnsemble.from_base(model, args.num_members, peft_config, seed=args.seed)
