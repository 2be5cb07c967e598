"""Which completion each member prefers, how sure the mixture is, and on which pairs members contradict each other.

Tokens, reference and joint forward are the same as in training. Read next: `renyi.objectives.preference` (margins).
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.dpo_trainer import DataCollatorForPreference

from renyi.data import VOTE_COLUMNS, PairPreparation, count_cut_pairs
from renyi.ensemble import LoraEnsemble, Reference, completion_labels
from renyi.inference.scoring import check_finite, cut_to_fit, scored
from renyi.measures import draw_uncertainty, token_uncertainty
from renyi.objectives import (
    LogRatios,
    PreferenceLoss,
    Votes,
    completion_log_prob,
    example_responsibilities,
    outcome_log_probs,
    preference_log_likelihood,
    preference_margin,
    renyi_loss,
    votes_log_likelihood,
)


class PairScore(NamedTuple):
    """What an ensemble of M members says about one pair.

    Attributes:
        index: row of the dataset, counted from 0.
        tokens: of both completions.
        margin: each member's reward margin Δ_m of chosen over rejected, [M].
        preference: the mixture's probability Σ_m π_m σ(Δ_m) that the chosen completion is preferred.
        log_likelihood: of the label under each member, log σ(Δ_m), or −loss_m for another loss; of all labels if the
            pair has votes; [M].
        responsibilities: share of the pair that each member would learn from at the ensemble's alpha, [M].
        mixture_nll: −log of `preference`, nats; with votes, −log Σ_m π_m of the probability of all labels.
        total: entropy of the mixture's preference, nats. It is aleatoric + epistemic.
        aleatoric: the mean entropy of a member's (or a draw's) preference, nats.
        epistemic: the members' disagreement (mutual information of member and preference), nats.
        within_members: if the M are draws of members, the part of `epistemic` that a member's draws do not agree on,
            nats; else None.
        between_members: the rest of it, what members disagree about, nats; else None.
        votes: how many labels are "chosen", "rejected" and "tie"; None if the rows have no votes.
        group: the group that shares a responsibility with this pair (`routing_group`); None if the rows have none.
        group_responsibilities: of that group as a whole, [M].
    """

    index: int  # type: ignore[assignment]
    tokens: int
    margin: list[float]
    preference: float
    log_likelihood: list[float]
    responsibilities: list[float]
    mixture_nll: float
    total: float
    aleatoric: float
    epistemic: float
    within_members: float | None = None
    between_members: float | None = None
    votes: tuple[int, int, int] | None = None
    group: str | None = None
    group_responsibilities: list[float] | None = None

    @property
    def epistemic_share(self) -> float:
        """The part of the uncertainty that is disagreement, from 0 to 1; 0 where nothing is uncertain."""
        return min(1.0, self.epistemic / self.total) if self.total > 0 else 0.0


def score_pairs(
    ensemble: LoraEnsemble,
    pairs: Dataset,
    loss: PreferenceLoss,
    reference: Reference,
    preparation: PairPreparation,
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> list[PairScore]:
    """Score every pair of a prepared dataset under every member.

    Args:
        ensemble: M members.
        pairs: with columns `prompt_ids`, `chosen_ids`, `rejected_ids`, as `prepare_pairs` makes them.
        loss: the settings that margins and likelihoods are computed with.
        reference: what log-ratios are measured against.
        preparation: where pairs are cut; at the positions of the base at the latest. A warning counts those cut.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single pair is scored alone.
        progress: called after each batch with the number of pairs done.

    Returns:
        One score a pair, in the dataset's order.

    Raises:
        ConfigError: the members are reward models.
        EnsembleFormatError: a member gives no finite likelihood.
    """
    ensemble.check_writes()
    preparation = cut_to_fit(ensemble, pairs, preparation, count_cut_pairs)
    collate = DataCollatorForPreference(0, preparation.max_length, preparation.truncation_mode)
    columns = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    votes_N3 = votes_of(pairs)
    lengths = [
        min(len(prompt) + max(len(chosen), len(rejected)), preparation.max_length or sys.maxsize)
        for batch in columns.iter(1000)
        for prompt, chosen, rejected in zip(*batch.values(), strict=True)
    ]

    def score_batch(rows: list[int]) -> list[PairScore]:
        batch = {k: v.to(ensemble.device) for k, v in collate([columns[i] for i in rows]).items()}
        votes = None if votes_N3 is None else Votes(*votes_N3[rows].T)
        return _score_batch(ensemble, rows, batch, loss, reference, votes)

    return scored(ensemble, pairs, lengths, score_batch, tokens_per_batch, progress, rows_per_example=2)


def votes_of(pairs: Dataset) -> Tensor | None:
    """The votes [N, 3] of prepared pairs: for chosen, rejected and tie. None if they have none."""
    if VOTE_COLUMNS[0] not in pairs.column_names:
        return None
    return torch.tensor([pairs[column] for column in VOTE_COLUMNS]).T


def _score_batch(
    ensemble: LoraEnsemble,
    rows: list[int],
    batch: dict[str, Tensor],
    loss: PreferenceLoss,
    reference: Reference,
    votes: Votes | None,
) -> list[PairScore]:
    mask = batch["completion_mask"]
    output = ensemble(batch["input_ids"], batch["attention_mask"], completion_labels(batch))
    logps_M2B = ensemble.gathered(completion_log_prob(output.log_probs, mask[:, 1:], loss.ld_alpha))
    ratios_M2B = logps_M2B - reference.log_probs(batch, loss.ld_alpha)
    ratios = LogRatios(*ratios_M2B.chunk(2, dim=1), *mask.sum(dim=1).chunk(2))
    margin_MB = preference_margin(ratios, loss).double().cpu()
    if votes is None:
        ell_MB = preference_log_likelihood(ratios, loss).double().cpu()
    else:
        given = Votes(*(x.to(ratios.chosen.device) for x in votes))
        ell_MB = votes_log_likelihood(ratios, given, loss).double().cpu()
    tokens_B = mask[:, 1:].sum(dim=1).view(2, -1).sum(dim=0).cpu()
    return scores_of_margins(ensemble, rows, tokens_B, margin_MB, ell_MB, votes, loss.tie_strength)


def scores_of_margins(
    ensemble: LoraEnsemble,
    rows: Sequence[int],
    tokens_B: Tensor,
    margin_MB: Tensor,
    ell_MB: Tensor,
    votes: Votes | None,
    tie_strength: float = 0.0,
) -> list[PairScore]:
    """What the members' margins say about pairs. `reward_scores.py` has margins between rewards.

    Args:
        ensemble: whose weights and order are used.
        rows: the pairs' numbers in their dataset, [B].
        tokens_B: of both completions.
        margin_MB: Δ_m, float64.
        ell_MB: log-likelihood of the label or of all votes, float64, nats.
        votes: of the pairs; None if they have none.
        tie_strength: ν of votes.

    Raises:
        EnsembleFormatError: a margin or a log-likelihood is not finite.
    """
    check_finite(torch.cat([ell_MB, margin_MB]), rows, "preference")
    log_weights, draws = ensemble.weights.double().cpu().log(), ensemble.num_draws
    log_preference_MB2 = logsigmoid(torch.stack([margin_MB, -margin_MB], dim=-1))
    log_mixture_B2 = (log_weights[:, None, None] + log_preference_MB2).logsumexp(dim=0)
    uncertainty = token_uncertainty(log_preference_MB2, log_weights)
    parts = draw_uncertainty(log_preference_MB2, log_weights, draws) if draws > 1 else None
    nothing = [None] * len(rows)
    nll_B = -log_mixture_B2[:, 0] if votes is None else _nll_of_votes(margin_MB, votes, tie_strength, log_weights)
    order = tokens_B, ensemble.alpha, log_weights, ensemble.routing_quantity
    return [
        PairScore(*values)
        for values in zip(
            rows,
            tokens_B.tolist(),
            margin_MB.T.tolist(),
            log_mixture_B2[:, 0].exp().tolist(),
            ell_MB.T.tolist(),
            example_responsibilities(ell_MB, *order).T.tolist(),
            nll_B.tolist(),
            uncertainty.total.tolist(),
            uncertainty.aleatoric.tolist(),
            uncertainty.epistemic.tolist(),
            parts.within_members.tolist() if parts else nothing,
            parts.between_members.tolist() if parts else nothing,
            nothing if votes is None else list(zip(*(x.tolist() for x in votes), strict=True)),
            strict=True,
        )
    ]


def _nll_of_votes(margin_MB: Tensor, votes: Votes, tie_strength: float, log_weights: Tensor) -> Tensor:
    """−log Σ_m π_m Π P_m(label) over the labels of each pair, nats. Ties that have no probability are left out."""
    log_p_MB3 = outcome_log_probs(margin_MB, tie_strength)
    counts_B3 = torch.stack(votes, dim=-1).to(log_p_MB3)
    kept = 3 if tie_strength > 0 else 2
    return renyi_loss((log_p_MB3[..., :kept] * counts_B3[:, :kept]).sum(dim=-1), 1.0, log_weights)
