"""Preference optimisation of an ensemble with the α-Rényi loss.

The one difference from TRL's DPOTrainer is `compute_loss`: a joint forward gives each pair's margin under every
member, the margin gives the log-likelihood of the pair's label, and the objective is the Rényi loss of those. For fresh
members the reference is the frozen base, computed once for all members. The loop is TRL's.

Read next: `trainer.py` (what every ensemble trainer changes), `renyi.objectives.preference` (the formulas).
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from renyi import data
from renyi.ensemble import JointOutput, LoraEnsemble, Reference, completion_labels, write_preference
from renyi.errors import ConfigError
from renyi.objectives import (
    COUPLED_LOSSES,
    F_DIVERGENCES,
    PAIR_LOSSES,
    LogRatios,
    PreferenceLoss,
    completion_log_prob,
    preference_log_likelihood,
)
from renyi.routing import Sums, routing_sums, share_of
from renyi.training.card import Method
from renyi.training.config import EnsembleConfig, require
from renyi.training.reference import with_reference
from renyi.training.report import ACCURACY
from renyi.training.start import as_ensemble
from renyi.training.statistics import mean_of_members
from renyi.training.trainer import EnsembleTrainer


@dataclass
class RenyiDPOConfig(EnsembleConfig, DPOConfig):
    """TRL's DPOConfig plus what an ensemble needs, see `EnsembleConfig`.

    `learning_rate` defaults to 1e-5, ten times TRL's, because only adapters are trained. Every `loss_type` of a single
    pair works, alone or weighted; those that couple the pairs of a batch are refused.

    Args:
        reference: what margins are measured against: "start", each member as it was when training began (for fresh
            members that is the base, computed once for all), or "base", the frozen base without adapters.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    reference: str = field(
        default="start",
        metadata={
            "help": "What margins are measured against: each member as training began, or the base.",
            "choices": ["start", "base"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.loss_type:
            if name in COUPLED_LOSSES:
                raise ConfigError(
                    f"{name!r} couples pairs ({COUPLED_LOSSES[name]}), so that no pair has a likelihood of its own",
                    where="loss_type",
                    hint=f"Give one or several of {', '.join(PAIR_LOSSES)}.",
                )
            require("loss_type", name, name in PAIR_LOSSES, f"one or several of {', '.join(PAIR_LOSSES)}")
        require("beta", self.beta, 0 < self.beta < math.inf, "a number above 0")
        divergence, order = self.f_divergence_type, self.f_alpha_divergence_coef
        require("f_divergence_type", divergence, divergence in F_DIVERGENCES, f"one of {', '.join(F_DIVERGENCES)}")
        require("f_alpha_divergence_coef", order, math.isfinite(order), "a finite number")
        require("discopop_tau", self.discopop_tau, 0 < self.discopop_tau < math.inf, "a number above 0")
        ld_alpha, smoothing = self.ld_alpha, self.label_smoothing
        require("ld_alpha", ld_alpha, ld_alpha is None or 0 <= ld_alpha <= 1, "a number from 0 to 1, or leave it out")
        smooths = {"robust", "exo_pair"} & set(self.loss_type)
        require("label_smoothing", smoothing, 0 <= smoothing < 0.5, "a share below 0.5")
        require("label_smoothing", smoothing, not smoothing or bool(smooths), "it to the losses robust and exo_pair")
        require("label_smoothing", smoothing, smoothing > 0 or "exo_pair" not in smooths, "1e-3 for exo_pair")
        require("reference", self.reference, self.reference in ("start", "base"), "'start' or 'base'")
        require("use_weighting", True, not self.use_weighting, "false: WPO's weights are not built")
        require("sync_ref_model", True, not self.sync_ref_model, "false: the reference is the frozen base")

    @property
    def preference_loss(self) -> PreferenceLoss:
        return PreferenceLoss(
            beta=self.beta,
            loss_type=tuple(self.loss_type),
            loss_weights=tuple(self.loss_weights) if self.loss_weights else None,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            ld_alpha=self.ld_alpha,
        )


class RenyiDPOTrainer(EnsembleTrainer, DPOTrainer):
    """TRL's DPOTrainer for an ensemble of LoRA adapters coupled by the α-Rényi loss.

    Minimises the mean over pairs of `−(1/α) log Σ_m π_m exp(α ℓ_m)` with ℓ_m = log σ(Δ_m), the Bradley–Terry
    log-likelihood of the label under member m, or ℓ_m = −loss_m for another loss ("Soft Specialists", arXiv
    2605.27747). As for `RenyiSFTTrainer`, α = 0 is exactly M independent runs of TRL's trainer, and M = 1 is one.

    Args:
        model: a folder, a hub id, a loaded base model, or a `LoraEnsemble` (or its folder) to go on training, such as
            one that was fine-tuned before.
        args: a `RenyiDPOConfig`.
        train_dataset: as for TRL: `prompt`, `chosen` and `rejected`, or the prompt within both; plain or
            conversational; or ShareGPT pairs.
        peft_config: a `peft.LoraConfig` for the members; rank 16 on all linear layers if not given.
        quantization_config: how to quantise the base when `model` is a name.
        kwargs: as for TRL's DPOTrainer, except `ref_model`: see `RenyiDPOConfig.reference`.

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is no number any more.
    """

    _tag_names = ["renyi", "lora", "ensemble", "dpo", "trl"]  # noqa: RUF012 (TRL's own form)
    _name = "Rényi DPO"
    unit = "pair"
    preparation_class = data.PairPreparation
    rows_per_example = 2
    routings = ("dense", "sampled", "sparse", "auto")  # not "raced": a margin is known only at the end of both rows

    args: RenyiDPOConfig
    preparation: data.PairPreparation

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: RenyiDPOConfig,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("ref_model") is not None:
            raise ConfigError("a second model is never needed", where="ref_model", hint="Set `reference` instead.")
        if args.precompute_ref_log_probs and isinstance(train_dataset, IterableDataset):
            raise ConfigError(
                "needs the whole dataset, and it is streamed",
                where="precompute_ref_log_probs",
                hint="Load the dataset whole, or compute the reference as training goes.",
            )
        ensemble = as_ensemble(model, args, peft_config, quantization_config)
        apart = args.reference == "start" and not ensemble.is_fresh
        if args.precompute_ref_log_probs and ensemble.mesh and (apart or args.shard_base):
            raise ConfigError(
                "needs all members and the whole base in every process, which are split here",
                where="precompute_ref_log_probs",
                hint="Leave it out: the reference is then computed as training goes.",
            )
        kwargs["ref_model"] = _NoSecondModel(ensemble)
        super().__init__(ensemble, args, train_dataset, callbacks=callbacks, **kwargs)
        if kwargs.get("data_collator") is None:  # then TRL's collator is used, and it cuts rows
            collator: Any = self.data_collator
            collator.max_length = self.preparation.within(self.limits).max_length
        _ = self.reference  # made now, before a checkpoint is resumed or a step is taken

    @cached_property
    def reference(self) -> Reference:
        """The reference that log-ratios are measured against."""
        keeps_start = self.args.reference == "start" and not self.model.is_fresh
        return Reference(self.model, self.model.snapshot() if keeps_start else None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The α-Rényi loss of a TRL batch of pairs, the chosen rows before the rejected: its mean over pairs."""
        mask = inputs["completion_mask"]
        reference_S2B = self._reference_log_probs(inputs)
        alpha = self.current_alpha
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        routed = self.joint_forward(model, {**rows, "labels": completion_labels(inputs)}, alpha)
        output = routed.output
        logps_M2B = self.model.gathered(completion_log_prob(output.log_probs, mask[:, 1:], self.args.ld_alpha))

        if len(reference_S2B) > 1:  # each member has a reference of its own, and so have its draws
            reference_S2B = reference_S2B.repeat_interleave(self.model.draws, dim=0)
        ratios = LogRatios(*(logps_M2B - reference_S2B).chunk(2, dim=1), *mask.sum(dim=1).chunk(2))
        ell_MB = preference_log_likelihood(ratios, self.args.preference_loss)
        tokens_B = output.label_mask.sum(dim=1).view(2, -1).sum(dim=0)
        loss_B, r_MB = self.objective.of_examples(ell_MB, tokens_B, alpha)
        loss = self.minimised(share_of(inputs) * loss_B.mean(), ell_MB, r_MB, inputs, num_items_in_batch)
        pair_sums = self.pair_sums(loss, routed, r_MB)
        self._watch_pairs(inputs, output, logps_M2B.detach(), ratios, ell_MB.detach(), r_MB, pair_sums)
        return loss

    def _reference_log_probs(self, inputs: dict[str, Any]) -> Tensor:
        """[S, 2B], taken from the batch if they were computed before training."""
        if "ref_chosen_logps" in inputs:
            both = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            return both.view(len(both), -1).T
        return self.reference.log_probs(inputs, self.args.ld_alpha)

    def _watch_pairs(
        self,
        inputs: dict[str, Any],
        output: JointOutput,
        logps_M2B: Tensor,
        ratios: LogRatios,
        ell_MB: Tensor,
        r_MB: Tensor,
        pair_sums: Sums,
    ) -> None:
        """Log what TRL logs, for the mixture and for each member.

        Rewards and log-probabilities of the mixture are the weighted means over its members. The mixture prefers the
        chosen completion if its preference probability Σ_m π_m σ(Δ_m) is above one half. What is logged of a member is
        the mean over its draws.
        """
        weights_M1, draws = self.model.drawn_weights[:, None], self.model.draws
        chosen_MB, rejected_MB = self.args.beta * ratios.chosen.detach(), self.args.beta * ratios.rejected.detach()
        margin_MB, (logps_chosen_MB, logps_rejected_MB) = chosen_MB - rejected_MB, logps_M2B.chunk(2, dim=1)
        preferred_B = (weights_M1 * torch.sigmoid(margin_MB)).sum(dim=0) > 0.5
        of_members = {
            "rewards/chosen": chosen_MB,
            "rewards/rejected": rejected_MB,
            "rewards/margins": margin_MB,
            "logps/chosen": logps_chosen_MB,
            "logps/rejected": logps_rejected_MB,
        }
        pairs = margin_MB.new_tensor(margin_MB.shape[1])
        sums = {name: ((weights_M1 * x_MB).sum(), pairs) for name, x_MB in of_members.items()}
        sums["rewards/accuracies"] = (preferred_B.sum(), pairs)
        of_members["rewards/accuracies"] = margin_MB > 0
        for name, x_MB in of_members.items():
            of_each = x_MB.sum(dim=1) if draws == 1 else x_MB.double().sum(dim=1).view(-1, draws).mean(dim=1)
            sums |= {f"{name}/{m}": (x, pairs) for m, x in enumerate(of_each)}

        chosen_tokens_BT = output.label_mask.chunk(2)[0]
        top1_MBT = output.is_top1[:, : len(chosen_tokens_BT)]
        sums["entropy"] = (mean_of_members(output.entropy), output.label_mask.sum())
        sums["mean_token_accuracy"] = (mean_of_members(top1_MBT), chosen_tokens_BT.sum())
        sums |= pair_sums
        self.watch(routing_sums(ell_MB, r_MB, self.model.drawn_weights.log(), pairs, draws) | sums, inputs)

    def method_card(self) -> Method:
        against = "the base" if self.reference.start is None else "each member's start (folder `reference`)"
        loss = f"{' + '.join(self.args.loss_type)}, beta {self.args.beta:g}, against {against}"
        card = super().method_card()
        measures = {**card.measures, "accuracy of the mixture's preference": ACCURACY}
        return card._replace(settings={"preference loss": loss}, measures=measures)

    def loss_units(self) -> int:
        if not isinstance(self.train_dataset, Dataset):
            raise ConfigError(
                "the number of pairs of a streamed dataset is unknown",
                where="prior_std",
                hint="Load the dataset whole, or train without a prior.",
            )
        return len(self.train_dataset)

    def _prepare_dataset(  # type: ignore[override]
        self, dataset: Any, processing_class: Any, args: RenyiDPOConfig, dataset_name: str
    ) -> Any:
        """Prepare rows with `renyi.data` instead of with TRL."""
        settings = self.preparation.within(self.limits)
        prepared = data.prepare_pairs(
            dataset, self._tokenizer, settings, f"{dataset_name} dataset", self.limits, args.dataset_num_proc
        )
        self.cut_rows[dataset_name] = data.count_cut_pairs(prepared, settings)
        return prepared

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As in TRL, but kept on disk by content. TRL uses the dataset's own cache, which another run does not find."""
        return with_reference(dataset, self.reference, self.data_collator, self.args, self.accelerator, batch_size)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.output_dir)
        if self.args.should_save:
            self.preparation.write(folder)
        if self.args.should_save or self.model.mesh:
            write_preference(folder, self.args.preference_loss, self.reference)


class _NoSecondModel(nn.Module):
    """Given to TRL so that it does not load the base again. The ensemble without its members is the reference."""

    def __init__(self, ensemble: LoraEnsemble):
        super().__init__()
        self.config = ensemble.config
