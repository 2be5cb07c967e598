"""Training of an ensemble of reward models with the α-Rényi loss.

The one difference from TRL's RewardTrainer is `compute_loss`: a joint forward gives both texts' rewards under every
member, each read off by the member's own head, and the objective is the Rényi loss of the log-likelihoods of the label.
The loop is TRL's.

Read next: `trainer.py` (what every ensemble trainer changes), `renyi.objectives.reward` (the formulas).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import RewardConfig, RewardTrainer

from renyi import data
from renyi.ensemble import KeptReward, LoraEnsemble, write_reward
from renyi.errors import ConfigError
from renyi.objectives import Votes, reward_log_likelihood
from renyi.routing import routing_sums, share_of
from renyi.training.card import Method
from renyi.training.config import AUTO, EnsembleConfig, require
from renyi.training.report import ACCURACY
from renyi.training.start import as_ensemble
from renyi.training.ties import settled_tie_strength
from renyi.training.trainer import EnsembleTrainer

CENTERED_ON = 128  # pairs of the training set over which a member's rewards have the mean 0


@dataclass
class RenyiRewardConfig(EnsembleConfig, RewardConfig):
    """TRL's RewardConfig plus what an ensemble needs, see `EnsembleConfig`.

    `learning_rate` keeps TRL's default for full training, 1e-4, which suits adapters.

    Args:
        tie_strength: ν of Davidson's model of ties in votes, as in `RenyiDPOConfig`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})

    tie_strength: float | None = field(
        default=None,
        metadata={"help": "Strength of ties in votes (Davidson's ν); by default from the share of ties."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require("alpha", self.alpha, self.alpha != AUTO, "a number: reward models are not diagnosed")
        center = self.center_rewards_coefficient
        expected = "a number of at least 0, or leave it out"
        require("center_rewards_coefficient", center, center is None or 0 <= center < math.inf, expected)
        ties = self.tie_strength
        require("tie_strength", ties, ties is None or 0 <= ties < math.inf, "a number from 0, or leave it out")
        require("routing_group", self.routing_group, self.routing_group is None, "none: each pair is routed alone")
        require("prior_std", self.prior_std, self.prior_std is None, "none: reward heads have no prior")
        alone = self.member_parallel == 1 and not self.shard_base
        key = "member_parallel" if self.member_parallel > 1 else "shard_base"
        require(key, getattr(self, key), alone, "reward models in one piece: leave it out")


class RenyiRewardTrainer(EnsembleTrainer, RewardTrainer):
    """TRL's RewardTrainer for an ensemble of LoRA adapters with a reward head each, coupled by the α-Rényi loss.

    Minimises the mean over pairs of `−(1/α) log Σ_m π_m exp(α ℓ_m)` with ℓ_m = log σ(r_m(chosen) − r_m(rejected) −
    margin), the Bradley–Terry log-likelihood of the label under member m ("Soft Specialists", arXiv 2605.27747). As for
    `RenyiSFTTrainer`, α = 0 is exactly M independent runs of TRL's trainer, and M = 1 is one. All members begin with
    the same head, that of the model, or the one that is drawn when a model without a head is loaded.

    Args:
        model: a folder, a hub id, a loaded model for sequence classification with one output, or a `LoraEnsemble` of
            reward models (or its folder) to train further.
        args: a `RenyiRewardConfig`.
        train_dataset: pairs, as for `RenyiDPOTrainer`, also with votes; or with a column `margin`.
        peft_config: a `peft.LoraConfig` for the members; rank 16 on all linear layers if not given.
        quantization_config: how to quantise the base when `model` is a name.
        kwargs: as for TRL's RewardTrainer.

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is NaN or infinite.
    """

    _tag_names = ["renyi", "lora", "ensemble", "reward-trainer", "trl"]  # noqa: RUF012 (TRL's own form)
    _name = "Rényi reward"
    unit = "pair"
    preparation_class = data.RatedPreparation
    rows_per_example = 2
    routings = ("dense", "sampled", "sparse", "auto")  # not "raced": a reward is known only at the end of both rows

    args: RenyiRewardConfig
    preparation: data.RatedPreparation

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: RenyiRewardConfig,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        ensemble = as_ensemble(model, args, peft_config, quantization_config, rates=True)
        if not ensemble.gives_rewards:
            raise ConfigError(
                "the ensemble writes texts and does not rate them",
                where="model",
                hint="Begin with a base model, or with an ensemble that `renyi reward` trained.",
            )
        ensemble.config.num_labels = 1
        super().__init__(ensemble, args, train_dataset, callbacks=callbacks, **kwargs)
        args.tie_strength = settled_tie_strength(args.tie_strength, self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The α-Rényi loss of a TRL batch of pairs, the chosen rows before the rejected: its mean over pairs."""
        alpha = self.current_alpha
        routed = self.joint_forward(model, {k: inputs[k] for k in ("input_ids", "attention_mask")}, alpha)
        rewards_M2B = self.model.gathered(routed.output.log_probs.sum(dim=-1))
        chosen_MB, rejected_MB = rewards_M2B.chunk(2, dim=1)
        has_votes, margin = data.VOTE_COLUMNS[0] in inputs, inputs.get("margin", 0.0)
        votes = Votes(*(inputs[column] for column in data.VOTE_COLUMNS)) if has_votes else None
        given = margin, self.args.center_rewards_coefficient, votes, self.args.tie_strength or 0.0
        ell_MB = reward_log_likelihood(chosen_MB, rejected_MB, *given)
        tokens_B = inputs["attention_mask"].sum(dim=1).view(2, -1).sum(dim=0)
        loss_B, r_MB = self.objective.of_examples(ell_MB, tokens_B, alpha)
        loss = self.minimised(share_of(inputs) * loss_B.mean(), ell_MB, r_MB, inputs, num_items_in_batch)
        pairs, draws = ell_MB.new_tensor(ell_MB.shape[1]), self.model.draws
        sums = self._reward_sums(chosen_MB.detach(), rejected_MB.detach())
        sums |= self.pair_sums(loss, routed, r_MB)
        log_weights = self.model.drawn_weights.log()
        self.watch(routing_sums(ell_MB.detach(), r_MB, log_weights, pairs, draws) | sums, inputs)
        return (loss, {}) if return_outputs else loss

    def _reward_sums(self, chosen_MB: Tensor, rejected_MB: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What TRL logs, for the mixture (the weighted mean over members) and for each member.

        The mixture prefers the chosen text if its probability Σ_m π_m σ(r_m(chosen) − r_m(rejected)) is above one half.
        """
        weights_M1, draws = self.model.drawn_weights[:, None], self.model.draws
        pairs, margin_MB = chosen_MB.new_tensor(chosen_MB.shape[1]), chosen_MB - rejected_MB
        of_members = {"mean_reward": (chosen_MB + rejected_MB) / 2, "margin": margin_MB}
        sums = {name: ((weights_M1 * x_MB).sum(), pairs) for name, x_MB in of_members.items()}
        sums[ACCURACY] = (((weights_M1 * torch.sigmoid(margin_MB)).sum(dim=0) > 0.5).sum(), pairs)
        of_members[ACCURACY] = (margin_MB > 0).to(margin_MB)
        for name, x_MB in of_members.items():
            of_each = x_MB.sum(dim=1).view(-1, draws).mean(dim=1)
            sums |= {f"{name}/{m}": (x, pairs) for m, x in enumerate(of_each)}
        return sums

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """With the accuracy under TRL's name."""
        return {**means, "accuracy": means[ACCURACY]}

    @property
    def kept(self) -> KeptReward:
        """Each member's mean reward over some pairs of the training set, which its rewards are centred by."""
        pairs = data.sample(self.train_dataset, CENTERED_ON)
        was_training, self_model = self.model.training, self.model
        total_M, rows = torch.zeros(self_model.num_members, dtype=torch.float64), 0
        self_model.eval()
        with torch.no_grad():
            for start in range(0, len(pairs), 8):
                columns = [c for c in ("chosen_ids", "rejected_ids") if c in pairs.column_names]
                some = pairs.select(range(start, min(start + 8, len(pairs)))).select_columns(columns)
                batch = self._prepare_inputs(self.data_collator(list(some)))
                with self.accelerator.autocast():
                    rewards_MB = self_model.rewards(batch["input_ids"], batch["attention_mask"])
                total_M += rewards_MB.double().sum(dim=1).cpu()
                rows += rewards_MB.shape[1]
        self_model.train(was_training)
        return KeptReward(total_M / rows, self.args.tie_strength or 0.0)

    def method_card(self) -> Method:
        card, center = super().method_card(), self.args.center_rewards_coefficient
        loss = "Bradley–Terry" + (f", ties {self.args.tie_strength:.3g}" if self.args.tie_strength else "")
        loss += f", rewards centred with weight {center:g}" if center is not None else ""
        measures = {**card.measures, "accuracy of the mixture's preference": ACCURACY}
        return card._replace(settings={"reward loss": loss}, measures=measures, is_reward=True)

    def loss_units(self) -> int:
        return len(data.countable(self.train_dataset, "pairs"))

    def _prepare_dataset(  # type: ignore[override]
        self, dataset: Any, processing_class: Any, args: RenyiRewardConfig, dataset_name: str
    ) -> Any:
        """Prepare rows with `renyi.data` instead of with TRL."""
        name, limits = f"{dataset_name} dataset", self.limits
        return data.prepare_rated(dataset, processing_class, self.preparation, name, limits, args.dataset_num_proc)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.output_dir)
            self.preparation.write(folder)
            write_reward(folder, self.kept)
