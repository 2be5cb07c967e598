"""Training of an ensemble on thumbs (KTO) with the α-Rényi loss.

The one difference from TRL's KTOTrainer is `compute_loss`: a joint forward gives each completion's log-ratio under
every member. With the member's own reference point it gives the log-likelihood of the thumb, and the objective is the
Rényi loss of those. The loop, the order of the rows and the mismatched completions are TRL's.

Read next: `referenced.py` (the reference), `renyi.objectives.thumbs` (the formulas).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import KTOConfig, KTOTrainer

from renyi import data
from renyi.ensemble import JointOutput, KeptThumbs, completion_labels, read_thumbs, write_thumbs
from renyi.objectives import THUMB_LOSSES, ThumbLoss, reference_point, thumb_log_likelihood, thumb_logit
from renyi.routing import routing_sums, share_of
from renyi.training.card import Method
from renyi.training.config import AUTO, require
from renyi.training.log import mean_of_members
from renyi.training.referenced import ReferencedConfig, ReferencedTrainer
from renyi.training.report import ACCURACY

POINT = "reference_point"  # in a batch whose reference points are known: z of each member, a list of M numbers
MEMORY = 0.9  # how much of the kept reference points each batch of training leaves


@dataclass
class RenyiKTOConfig(ReferencedConfig, KTOConfig):
    """TRL's KTOConfig plus what an ensemble needs, see `EnsembleConfig` and `ReferencedConfig`.

    `learning_rate` defaults to 1e-5, ten times TRL's, because only adapters are trained.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require("alpha", self.alpha, self.alpha != AUTO, "a number: thumbs are not diagnosed")
        require("loss_type", self.loss_type, self.loss_type in THUMB_LOSSES, f"one of {', '.join(THUMB_LOSSES)}")
        for key in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, key)
            require(key, weight, 0 <= weight < math.inf, "a number of at least 0")
        weights = self.desirable_weight + self.undesirable_weight
        require("desirable_weight", self.desirable_weight, weights > 0, "a weight above 0 for one kind of thumbs")
        mismatched = self.thumb_loss.has_reference_point
        batch, order = self.per_device_train_batch_size, self.train_sampling_strategy
        expected = "at least 2: each completion is also compared with another one's prompt"
        require("per_device_train_batch_size", batch, batch > 1 or not mismatched, expected)
        expected = "'sequential': a completion is paired with the prompt of the row after it"
        require("train_sampling_strategy", order, order == "sequential" or not mismatched, expected)

    @property
    def thumb_loss(self) -> ThumbLoss:
        return ThumbLoss(
            beta=self.beta,
            loss_type=self.loss_type,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


class RenyiKTOTrainer(ReferencedTrainer, KTOTrainer):
    """TRL's KTOTrainer for an ensemble of LoRA adapters coupled by the α-Rényi loss.

    Minimises the mean over rows of `−(1/α) log Σ_m π_m exp(α ℓ_m)` with ℓ_m = −loss_m, the KTO loss of the thumb under
    member m with the member's own reference point (KTO, arXiv 2402.01306; "Soft Specialists", arXiv 2605.27747). As for
    `RenyiSFTTrainer`, α = 0 is exactly M independent runs of TRL's trainer, and M = 1 is one.

    Args:
        model: a folder, a hub id, a loaded base model, or a `LoraEnsemble` (or its folder) to train further.
        args: a `RenyiKTOConfig`.
        train_dataset: rows of `prompt`, `completion` and `label` (true or false); plain or conversational.
        kwargs: `peft_config`, `quantization_config`, and the arguments of TRL's KTOTrainer except `ref_model`: see
            `RenyiKTOConfig.reference`.

    Raises:
        ConfigError, DataError: before anything is written.
        TrainingDivergedError: in training, when the loss is NaN or infinite.
    """

    _tag_names = ["renyi", "lora", "ensemble", "kto", "trl"]  # noqa: RUF012 (TRL's own form)
    _name = "Rényi KTO"
    unit = "thumb"
    preparation_class = data.ThumbPreparation
    routings = ("dense", "sampled", "sparse", "auto")  # not "raced": a reward is known only at the end of a row

    args: RenyiKTOConfig
    preparation: data.ThumbPreparation
    _kept_point: list[float] | None = None  # of each member, a running mean over batches

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in TRL. The reference points are computed before the batch is run in parts: they belong to the whole.

        Those of members that are distributions are their means'.
        """
        inputs = self._with_reference_point(self._prepare_inputs(inputs))
        new = inputs[POINT]
        kept = new if self._kept_point is None else self._kept_point
        self._kept_point = [MEMORY * k + (1 - MEMORY) * n for k, n in zip(kept, new, strict=True)]
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in TRL. The reference points are those of the members' means, as in training: nothing is drawn yet."""
        return super().prediction_step(model, self._with_reference_point(self._prepare_inputs(inputs)), *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The α-Rényi loss of a TRL batch of thumbs: its mean over rows."""
        inputs = self._with_reference_point(inputs)
        reference_SB = self.known_log_probs(inputs)["ref_logps"]
        alpha, loss_of = self.current_alpha, self.args.thumb_loss
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        routed = self.joint_forward(model, {**rows, "labels": completion_labels(inputs)}, alpha)
        output = routed.output
        logps_MB = self.model.gathered(output.log_probs.sum(dim=-1))

        draws = self.model.draws
        if len(reference_SB) > 1:  # each member has a reference of its own, and so have its draws
            reference_SB = reference_SB.repeat_interleave(draws, dim=0)
        is_good_B, ratio_MB = inputs["label"].bool(), logps_MB - reference_SB
        point_M = torch.tensor(inputs[POINT], dtype=ratio_MB.dtype, device=ratio_MB.device)
        logit_MB = thumb_logit(ratio_MB, point_M.repeat_interleave(draws), loss_of)
        ell_MB = thumb_log_likelihood(logit_MB, is_good_B, loss_of)
        loss_B, r_MB = self.routed_loss(ell_MB, output.label_mask.sum(dim=1), alpha, inputs)
        loss = share_of(inputs) * loss_B.sum() / ell_MB.shape[1]
        loss = self.minimised(loss, ell_MB, r_MB, inputs, num_items_in_batch)
        pair_sums = self.pair_sums(loss, routed, r_MB)
        sums = self._thumb_sums(output, logps_MB.detach(), ratio_MB.detach(), logit_MB.detach(), is_good_B)
        sums |= {f"kl/{m}": (z * len(is_good_B), torch.ones_like(z) * len(is_good_B)) for m, z in enumerate(point_M)}
        examples = ratio_MB.new_tensor(ratio_MB.shape[1])
        sums |= routing_sums(ell_MB.detach(), r_MB, self.model.drawn_weights.log(), examples, draws)
        sums |= pair_sums
        self.watch(sums, inputs)
        return loss

    @property
    def kept(self) -> KeptThumbs:
        """What rewards and thumbs are computed with after training."""
        point = self._kept_point or [0.0] * self.model.num_members
        return KeptThumbs(self.args.thumb_loss, self.reference, torch.tensor(point))

    def _with_reference_point(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the members' reference points, instead of the mismatched completions that they come from."""
        if POINT in inputs:
            return inputs
        rest = {name: x for name, x in inputs.items() if not name.startswith("KL_") and name != "ref_KL_logps"}
        if not self.args.thumb_loss.has_reference_point:
            return rest | {POINT: [0.0] * self.model.num_members}
        mismatched = _mismatched(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            labels = completion_labels(mismatched)
            output = self.model(mismatched["input_ids"], mismatched["attention_mask"], labels)
            logps_MB = self.model.gathered(output.log_probs.sum(dim=-1))
            known = inputs.get("ref_KL_logps")
            reference_SB = self.reference.log_probs(mismatched) if known is None else known.view(len(known), -1).T
        everyones_PM = self.accelerator.gather_for_metrics((logps_MB - reference_SB).mean(dim=1)[None])
        return rest | {POINT: reference_point(everyones_PM.T).tolist()}

    def reference_log_probs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        known = {"ref_logps": self.reference.log_probs(inputs)}
        if "KL_input_ids" in inputs:
            known["ref_KL_logps"] = self.reference.log_probs(_mismatched(inputs))
        return known

    def _thumb_sums(
        self, output: JointOutput, logps_MB: Tensor, ratio_MB: Tensor, logit_MB: Tensor, is_good_B: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What TRL logs, for the mixture (the weighted mean over members) and for each member.

        The mixture predicts thumbs up if its probability Σ_m π_m σ(t_m) is above one half. What is logged of a member
        is the mean over its draws.
        """
        weights_M1, many = self.model.drawn_weights[:, None], ratio_MB.new_tensor(ratio_MB.shape[1])

        def of_each(sums_M: Tensor) -> Tensor:
            return sums_M if self.model.draws == 1 else sums_M.double().view(-1, self.model.draws).mean(dim=1)

        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for side, of_side_B in (("chosen", is_good_B), ("rejected", ~is_good_B)):
            count = of_side_B.sum().to(ratio_MB)
            for name, x_MB in (("rewards", self.args.beta * ratio_MB), ("logps", logps_MB)):
                sum_M = (x_MB * of_side_B).sum(dim=1)
                sums[f"{name}/{side}"] = ((weights_M1[:, 0] * sum_M).sum(), count)
                sums |= {f"{name}/{side}/{m}": (x, count) for m, x in enumerate(of_each(sum_M))}
        is_up_B = (weights_M1 * torch.sigmoid(logit_MB)).sum(dim=0) > 0.5
        sums[ACCURACY] = ((is_up_B == is_good_B).sum(), many)
        right_MB = (logit_MB > 0) == is_good_B
        sums |= {f"{ACCURACY}/{m}": (x, many) for m, x in enumerate(of_each(right_MB.sum(dim=1)))}
        sums["entropy"] = (mean_of_members(output.entropy), output.label_mask.sum())
        return sums

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """With the margins between rewards of thumbs up and down, and the mixture's mean reference point."""
        weights = self.model.weights.tolist()
        means = {**means, "kl": sum(w * means[f"kl/{m}"] for m, w in enumerate(weights))}
        for of in ("", *(f"/{m}" for m in range(len(weights)))):
            chosen, rejected = (means.get(f"rewards/{side}{of}") for side in ("chosen", "rejected"))
            if chosen is not None and rejected is not None:
                means[f"rewards/margins{of}"] = chosen - rejected
        return means

    def method_card(self) -> Method:
        args, card = self.args, super().method_card()
        weights = f"weights {args.desirable_weight:g} (up) and {args.undesirable_weight:g} (down)"
        loss = f"{args.loss_type}, beta {args.beta:g}, {weights}, against {self.against}"
        measures = {**card.measures, "share of thumbs that the mixture predicts": ACCURACY}
        return card._replace(settings={"loss of a thumb": loss}, measures=measures, measured="measure, per thumb")

    def _prepare_dataset(  # type: ignore[override]
        self, dataset: Any, processing_class: Any, args: RenyiKTOConfig, dataset_name: str
    ) -> Any:
        """Prepare rows with `renyi.data` instead of with TRL, and give each the completion of the row before it."""
        settings = self.preparation.within(self.limits)
        name = f"{dataset_name} dataset"
        prepared = data.prepare_thumbs(dataset, self._tokenizer, settings, name, self.limits, args.dataset_num_proc)
        self.cut_rows[dataset_name] = data.count_cut_thumbs(prepared, settings)
        if dataset_name == "train" and isinstance(prepared, Dataset):
            data.check_both_kinds(prepared["label"], f"{name}, all rows, column label")
        if not args.thumb_loss.has_reference_point or "KL_completion_ids" in (prepared.column_names or ()):
            return prepared
        return prepared.map(_rotated, batched=True, batch_size=args.per_device_train_batch_size)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.output_dir)
        if self.args.should_save:
            self.preparation.write(folder)
        if self.args.should_save or self.model.mesh:
            write_thumbs(folder, self.kept)

    def _restore_members(self, checkpoint: str) -> None:
        super()._restore_members(checkpoint)
        kept = read_thumbs(checkpoint, self.model)
        self._kept_point = kept.reference_point.tolist() if kept else None


def _mismatched(inputs: dict[str, Any]) -> dict[str, Any]:
    """The mismatched prompts and completions of a batch, as a batch of their own."""
    return {name.removeprefix("KL_"): x for name, x in inputs.items() if name.startswith("KL_")}


def _rotated(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Within a batch, each prompt with the completion of the row before it; the first with the last one's, as TRL."""
    completions = rows["completion_ids"]
    return {"KL_completion_ids": [completions[-1], *completions[:-1]]}
