"""What each member makes of single completions: the reward, the probability of thumbs up, and how likely a thumb is.

Tokens, reference and joint forward are the same as in training. The reference points are those of the end of training,
so that a score is a function of its row alone. Read next: `renyi.objectives.thumbs` (the formulas).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from renyi.data import ThumbPreparation, count_cut_thumbs
from renyi.ensemble import KeptThumbs, LoraEnsemble, completion_labels
from renyi.inference.scoring import check_finite, cut_to_fit, scored
from renyi.measures import draw_uncertainty, token_uncertainty
from renyi.objectives import example_responsibilities, renyi_loss, thumb_log_likelihood, thumb_logit


class ThumbScore(NamedTuple):
    """What an ensemble of M members says about one completion and its thumb.

    Attributes:
        index: row of the dataset, counted from 0.
        tokens: of the completion.
        reward: each member's implied reward, β times the log-ratio to the reference, [M].
        reward_mean: the weighted mean of the members' rewards.
        reward_std: their weighted standard deviation.
        approval: the mixture's probability Σ_m π_m σ(t_m) of thumbs up.
        log_likelihood: of the thumb under each member in the loss of training, ℓ_m = −loss_m, [M].
        responsibilities: share of the row that each member would learn from at the ensemble's alpha, [M].
        mixture_nll: −log Σ_m π_m exp(ℓ_m), in the unit of the loss.
        total: entropy of the mixture's probability of thumbs up, nats. It is aleatoric + epistemic.
        aleatoric: the mean entropy of a member's (or a draw's) probability, nats.
        epistemic: the members' disagreement (mutual information of member and thumb), nats.
        within_members, between_members: the two parts of `epistemic` if the M are draws of members, nats; else None.
        group: the group that shares a responsibility with this row (`routing_group`); None if the rows have none.
        group_responsibilities: of that group as a whole, [M].
    """

    index: int  # type: ignore[assignment]
    tokens: int
    reward: list[float]
    reward_mean: float
    reward_std: float
    approval: float
    log_likelihood: list[float]
    responsibilities: list[float]
    mixture_nll: float
    total: float
    aleatoric: float
    epistemic: float
    within_members: float | None = None
    between_members: float | None = None
    group: str | None = None
    group_responsibilities: list[float] | None = None


def score_thumbs(
    ensemble: LoraEnsemble,
    thumbs: Dataset,
    kept: KeptThumbs,
    preparation: ThumbPreparation,
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> list[ThumbScore]:
    """Score every row of a prepared dataset of thumbs under every member.

    Args:
        ensemble: M members.
        thumbs: with columns `prompt_ids`, `completion_ids` and `label`, as `prepare_thumbs` makes them.
        kept: the loss, the reference and the reference points of training.
        preparation: where rows are cut; at the positions of the base at the latest. A warning counts those cut.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single row is scored alone.
        progress: called after each batch with the number of rows done.

    Returns:
        One score a row, in the dataset's order.

    Raises:
        ConfigError: the members are reward models.
        EnsembleFormatError: a member gives no finite reward.
    """
    ensemble.check_writes()
    preparation = cut_to_fit(ensemble, thumbs, preparation, count_cut_thumbs)
    collate = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=preparation.max_length)
    columns = thumbs.select_columns(["prompt_ids", "completion_ids", "label"])
    lengths = [
        len(p) + len(c) for b in columns.iter(1000) for p, c in zip(b["prompt_ids"], b["completion_ids"], strict=True)
    ]

    def score_batch(rows: list[int]) -> list[ThumbScore]:
        batch = {name: x.to(ensemble.device) for name, x in collate([columns[i] for i in rows]).items()}
        return _score_batch(ensemble, rows, batch, kept)

    return scored(ensemble, thumbs, lengths, score_batch, tokens_per_batch, progress)


def _score_batch(
    ensemble: LoraEnsemble, rows: list[int], batch: dict[str, Tensor], kept: KeptThumbs
) -> list[ThumbScore]:
    output = ensemble(batch["input_ids"], batch["attention_mask"], completion_labels(batch))
    logps_MB = ensemble.gathered(output.log_probs.sum(dim=-1))
    ratio_MB = (logps_MB - kept.reference.log_probs(batch)).double().cpu()
    check_finite(ratio_MB, rows, "reward")
    weights_M, loss = ensemble.weights.double().cpu(), kept.loss
    logit_MB = thumb_logit(ratio_MB, kept.reference_point.double(), loss)
    ell_MB = thumb_log_likelihood(logit_MB, batch["label"].bool().cpu(), loss)
    log_up_MB2 = logsigmoid(torch.stack([logit_MB, -logit_MB], dim=-1))
    uncertainty, draws = token_uncertainty(log_up_MB2, weights_M.log()), ensemble.num_draws
    parts = draw_uncertainty(log_up_MB2, weights_M.log(), draws) if draws > 1 else None
    nothing = [None] * len(rows)
    reward_MB, tokens_B = loss.beta * ratio_MB, output.label_mask.sum(dim=1).cpu()
    mean_B = weights_M @ reward_MB
    order = tokens_B, ensemble.alpha, weights_M.log(), ensemble.routing_quantity
    return [
        ThumbScore(*values)
        for values in zip(
            rows,
            tokens_B.tolist(),
            reward_MB.T.tolist(),
            mean_B.tolist(),
            (weights_M @ (reward_MB - mean_B).square()).sqrt().tolist(),
            (weights_M @ torch.sigmoid(logit_MB)).tolist(),
            ell_MB.T.tolist(),
            example_responsibilities(ell_MB, *order).T.tolist(),
            renyi_loss(ell_MB, 1.0, weights_M.log()).tolist(),
            uncertainty.total.tolist(),
            uncertainty.aleatoric.tolist(),
            uncertainty.epistemic.tolist(),
            parts.within_members.tolist() if parts else nothing,
            parts.between_members.tolist() if parts else nothing,
            strict=True,
        )
    ]
