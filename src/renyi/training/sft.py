"""Supervised fine-tuning of an ensemble with the α-Rényi loss.

The one difference from TRL's SFTTrainer is `compute_loss`: a joint forward gives each example's log-likelihood under
every member, and the objective is the Rényi loss of those. Packing, evaluation and the loop are TRL's.

Read next: `trainer.py`, what every ensemble trainer changes in the loop.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from renyi import data
from renyi.ensemble import LoraEnsemble, example_log_likelihood
from renyi.routing import KeptScores, routing_sums, share_of
from renyi.training.config import EnsembleConfig, require
from renyi.training.log import mean_of_members
from renyi.training.packing import check_packing
from renyi.training.row_groups import numbered
from renyi.training.trainer import EnsembleTrainer


@dataclass
class RenyiSFTConfig(EnsembleConfig, SFTConfig):
    """TRL's SFTConfig plus what an ensemble needs, see `EnsembleConfig`.

    `learning_rate` defaults to 2e-4, ten times TRL's, because only adapters are trained.

    Attributes:
        routing_refresh: with "sampled" and "raced" routing, how many visits a row is routed by one scoring under all
            members. With 1 it is scored at every visit. With n it is scored once in n epochs. In the others only the
            member that was drawn is run, and responsibilities follow from the kept scores.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate for AdamW."})
    routing_refresh: int = field(
        default=1,
        metadata={"help": "Epochs that sampled or raced routing uses the scores of a row before it scores it again."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require("loss_type", self.loss_type, self.loss_type == "nll", "'nll': the routed quantity is a log-likelihood")
        smoothing = self.label_smoothing_factor
        require("label_smoothing_factor", smoothing, smoothing == 0, "0: the routed quantity is a log-likelihood")
        wrapped = self.packing and self.packing_strategy == "wrapped"
        require("packing_strategy", self.packing_strategy, not wrapped, "'bfd': 'wrapped' loses where examples begin")
        packed = "packing" if self.packing else "padding_free"
        apart = self.routing_group is None or not (self.packing or self.padding_free)
        require(packed, True, apart, "false beside routing_group: packing mixes the rows of groups")
        self._check_refresh(packed)

    def _check_refresh(self, packed: str) -> None:
        """Raise `ConfigError` about a setting that does not go with `routing_refresh`."""
        refresh, beside = self.routing_refresh, "beside routing_refresh"
        require("routing_refresh", refresh, refresh >= 1, "a number of at least 1")
        if refresh == 1:
            return
        draws = self.routing in ("sampled", "raced")
        require("routing", self.routing, draws, f"'sampled' or 'raced' {beside}: others run every member anyway")
        require(packed, True, not (self.packing or self.padding_free), f"false {beside}: scores are kept by row")
        require("routing_group", self.routing_group, self.routing_group is None, f"none {beside}")
        require("routing_refresh", refresh, self.data_processes == 1, "1 where processes train different rows")


class RenyiSFTTrainer(EnsembleTrainer, SFTTrainer):
    """TRL's SFTTrainer for an ensemble of LoRA adapters coupled by the α-Rényi loss.

    Minimises `Σ_i −(1/α) log Σ_m π_m p_m(y_i | x_i)^α` per trained token ("Soft Specialists", arXiv 2605.27747,
    with α scheduled from 0). Gradients are M times those of the reported loss, because responsibilities sum to one:
    a learning rate means what it means for a single adapter, and α = 0 is exactly M independent runs.

    Args:
        model: a folder, a hub id, a loaded base model, or a `LoraEnsemble` to train further.
        args: a `RenyiSFTConfig`.
        train_dataset: as for TRL: `text`, `messages`, `prompt` + `completion`, ShareGPT `conversations`, or tokenised;
            or Alpaca records.
        peft_config: a `peft.LoraConfig` for the members; rank 16 on all linear layers if not given.
        quantization_config: how to quantise the base when `model` is a name.
        kwargs: as for TRL's SFTTrainer (`eval_dataset`, `processing_class`, `callbacks`, `data_collator`,
            `optimizers`, `formatting_func`, …).

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is NaN or infinite.
    """

    _tag_names = ["renyi", "lora", "ensemble", "sft", "trl"]  # noqa: RUF012 (TRL's own form)
    _name = "Rényi SFT"

    unit = "trained token"
    routes_tokens = True
    preparation_class = data.Preparation

    args: RenyiSFTConfig
    preparation: data.Preparation

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: RenyiSFTConfig,
        train_dataset: Dataset | IterableDataset,
        **kwargs: Any,
    ):
        super().__init__(model, args, train_dataset, **kwargs)
        if self.padding_free:
            check_packing(self.model, self.data_collator)
        if args.routing_refresh > 1:
            rows = self.train_dataset = numbered(self.train_dataset, "routing_refresh")
            self.router.kept = KeptScores(self.model.num_members * args.num_draws, len(rows), args.routing_refresh)

    def loss_units(self) -> int:
        return data.count_tokens(self.train_dataset).trained

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The α-Rényi loss of a TRL batch, in nats per trained token."""
        alpha = self.current_alpha
        routed = self.joint_forward(model, inputs, alpha)
        output = routed.output
        ell_ME, tokens_E = example_log_likelihood(output, inputs.get("position_ids"))
        if self.args.routing_quantity == "token":  # each trained token is an example
            ell_ME = output.log_probs[:, output.label_mask]
            tokens_E = torch.ones_like(ell_ME[0])
        ell_ME = self.model.gathered(ell_ME)
        loss_E, r_ME = self.routed_loss(ell_ME, tokens_E, alpha, inputs)

        own_tokens = tokens_E.sum() / share_of(inputs)
        num_tokens = own_tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss_E.sum() / num_tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The loss is divided by the tokens of all processes, and DDP averages gradients.
            loss = loss * self.accelerator.num_processes
        loss = self.minimised(loss, ell_ME, r_ME, inputs, num_items_in_batch)

        tokens = tokens_E.sum()
        self.watch(
            {
                **routing_sums(ell_ME.detach(), r_ME, self.model.drawn_weights.log(), tokens, self.model.draws),
                "entropy": (mean_of_members(output.entropy), tokens),
                "mean_token_accuracy": (mean_of_members(output.is_top1), tokens),
                **self.pair_sums(loss, routed, r_ME),
            },
            inputs,
        )
        return loss

    def _prepare_dataset(  # type: ignore[override]
        self,
        dataset: Any,
        processing_class: Any,
        args: RenyiSFTConfig,
        packing: bool,
        formatting_func: Any,
        name: str,
    ) -> Any:
        """Prepare rows with `renyi.data` instead of with TRL, then pack them with TRL."""
        if "seq_lengths" in (dataset.column_names or ()):  # packed already
            return dataset
        settings = self.preparation
        if formatting_func is not None:
            dataset = dataset.map(lambda row: {"text": formatting_func(row)}).select_columns("text")
            settings = replace(settings, dataset_text_field="text")
        if packing and args.packing_strategy == "bfd_split":
            settings = replace(settings, max_length=None)  # packing splits long examples instead of cutting them
        limits = self.limits
        prepared = data.prepare(
            dataset, self._tokenizer, settings, f"{name} dataset", limits, num_proc=args.dataset_num_proc
        )
        self.cut_rows[name] = data.count_cut(prepared)
        if packing:
            shorter = copy.copy(args)
            shorter.max_length = limits.longest(args.max_length)
            return super()._prepare_dataset(prepared, processing_class, shorter, True, None, name)
        return prepared.shuffle(seed=args.seed) if args.shuffle_dataset else prepared

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.preparation.write(Path(output_dir or self.output_dir))
