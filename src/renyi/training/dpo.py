"""Preference optimisation of an ensemble with the α-Rényi loss.

The one difference from TRL's DPOTrainer is `compute_loss`: a joint forward gives each pair's margin under every
member, the margin gives the log-likelihood of the pair's label, and the objective is the Rényi loss of those. For fresh
members the reference is the frozen base, computed once for all members. The loop is TRL's.

Read next: `trainer.py` (what every ensemble trainer changes), `renyi.objectives.preference` (the formulas).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from renyi import data
from renyi.ensemble import JointOutput, LoraEnsemble, completion_labels, write_preference
from renyi.errors import ConfigError
from renyi.objectives import (
    COUPLED_LOSSES,
    F_DIVERGENCES,
    PAIR_LOSSES,
    TIE_LOSSES,
    LogRatios,
    PreferenceLoss,
    Votes,
    completion_log_prob,
    preference_log_likelihood,
    votes_log_likelihood,
)
from renyi.routing import Sums, routing_sums, share_of
from renyi.training.card import Method
from renyi.training.config import require
from renyi.training.log import mean_of_members
from renyi.training.referenced import ReferencedConfig, ReferencedTrainer
from renyi.training.report import ACCURACY
from renyi.training.ties import has_ties, settled_tie_strength


@dataclass
class RenyiDPOConfig(ReferencedConfig, DPOConfig):
    """TRL's DPOConfig plus what an ensemble needs, see `EnsembleConfig` and `ReferencedConfig`.

    `learning_rate` defaults to 1e-5, ten times TRL's, because only adapters are trained. Every `loss_type` of a single
    pair works, alone or weighted; those that couple the pairs of a batch are refused.

    Args:
        tie_strength: ν of Davidson's model of ties, see `renyi.objectives.votes`. By default the value at which a pair
            of equals is a tie as often as the training data's labels are; 0 without ties, which is Bradley–Terry.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    tie_strength: float | None = field(
        default=None,
        metadata={"help": "Strength of ties in votes (Davidson's ν); by default from the share of ties."},
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
        ties = self.tie_strength
        require("tie_strength", ties, ties is None or 0 <= ties < math.inf, "a number from 0, or leave it out")
        can_tie = not ties or " + ".join(self.loss_type) in TIE_LOSSES
        require("tie_strength", ties, can_tie, f"0, or a loss_type that knows ties: {' or '.join(TIE_LOSSES)}")
        require("use_weighting", True, not self.use_weighting, "false: WPO's weights are not built")

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
            tie_strength=self.tie_strength or 0.0,
        )


class RenyiDPOTrainer(ReferencedTrainer, DPOTrainer):
    """TRL's DPOTrainer for an ensemble of LoRA adapters coupled by the α-Rényi loss.

    Minimises the mean over pairs of `−(1/α) log Σ_m π_m exp(α ℓ_m)` with ℓ_m = log σ(Δ_m), the Bradley–Terry
    log-likelihood of the label under member m, or ℓ_m = −loss_m for another loss ("Soft Specialists", arXiv
    2605.27747). As for `RenyiSFTTrainer`, α = 0 is exactly M independent runs of TRL's trainer, and M = 1 is one.

    Args:
        model: a folder, a hub id, a loaded base model, or a `LoraEnsemble` (or its folder) to train further, such as
            one that was fine-tuned before.
        args: a `RenyiDPOConfig`.
        train_dataset: as for TRL: `prompt`, `chosen` and `rejected`, or the prompt within both; plain or
            conversational; or ShareGPT pairs. Rows may have votes, see `renyi.data.votes`.
        peft_config: a `peft.LoraConfig` for the members; rank 16 on all linear layers if not given.
        quantization_config: how to quantise the base when `model` is a name.
        kwargs: as for TRL's DPOTrainer, except `ref_model`: see `RenyiDPOConfig.reference`.

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is NaN or infinite.
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
        **kwargs: Any,
    ):
        super().__init__(model, args, train_dataset, **kwargs)
        self._settle_ties()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The α-Rényi loss of a TRL batch of pairs, the chosen rows before the rejected: its mean over pairs."""
        mask = inputs["completion_mask"]
        known = self.known_log_probs(inputs)
        reference_S2B = torch.cat([known["ref_chosen_logps"], known["ref_rejected_logps"]], dim=1)
        alpha = self.current_alpha
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        routed = self.joint_forward(model, {**rows, "labels": completion_labels(inputs)}, alpha)
        output = routed.output
        logps_M2B = self.model.gathered(completion_log_prob(output.log_probs, mask[:, 1:], self.args.ld_alpha))

        if len(reference_S2B) > 1:  # each member has a reference of its own, and so have its draws
            reference_S2B = reference_S2B.repeat_interleave(self.model.draws, dim=0)
        ratios = LogRatios(*(logps_M2B - reference_S2B).chunk(2, dim=1), *mask.sum(dim=1).chunk(2))
        ell_MB = self._log_likelihood(ratios, inputs)
        tokens_B = output.label_mask.sum(dim=1).view(2, -1).sum(dim=0)
        loss_B, r_MB = self.routed_loss(ell_MB, tokens_B, alpha, inputs)
        loss = share_of(inputs) * loss_B.sum() / ell_MB.shape[1]
        loss = self.minimised(loss, ell_MB, r_MB, inputs, num_items_in_batch)
        pair_sums = self.pair_sums(loss, routed, r_MB)
        self._watch_pairs(inputs, output, logps_M2B.detach(), ratios, ell_MB.detach(), r_MB, pair_sums)
        return loss

    def _log_likelihood(self, ratios: LogRatios, inputs: dict[str, Any]) -> Tensor:
        """[M, B], of the label of each pair, or of all of its votes."""
        if data.VOTE_COLUMNS[0] not in inputs:
            return preference_log_likelihood(ratios, self.args.preference_loss)
        votes = Votes(*(inputs[column] for column in data.VOTE_COLUMNS))
        return votes_log_likelihood(ratios, votes, self.args.preference_loss)

    def _settle_ties(self) -> None:
        """Take ν from the training data's votes if it was not given.

        Raises:
            ConfigError: there are ties, and the loss or the given ν cannot explain one.
        """
        args, name = self.args, " + ".join(self.args.loss_type)
        rows: Any = self.train_dataset
        if name not in TIE_LOSSES and isinstance(rows, Dataset) and has_ties(rows):
            raise ConfigError(
                f"{name!r} is no likelihood of a label, and some votes are ties",
                where="loss_type",
                hint=f"Give {' or '.join(TIE_LOSSES)}, or remove the ties.",
            )
        args.tie_strength = settled_tie_strength(args.tie_strength, rows)

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
        loss = f"{' + '.join(self.args.loss_type)}, beta {self.args.beta:g}, against {self.against}"
        card = super().method_card()
        measures = {**card.measures, "accuracy of the mixture's preference": ACCURACY}
        return card._replace(settings={"preference loss": loss}, measures=measures)

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

    def reference_log_probs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        chosen_SB, rejected_SB = self.reference.log_probs(inputs, self.args.ld_alpha).chunk(2, dim=1)
        return {"ref_chosen_logps": chosen_SB, "ref_rejected_logps": rejected_SB}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.output_dir)
        if self.args.should_save:
            self.preparation.write(folder)
        if self.args.should_save or self.model.mesh:
            write_preference(folder, self.args.preference_loss, self.reference)
