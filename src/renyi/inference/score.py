"""How likely each example is to every member, and which member would learn from it.

Tokens, labels and joint forward are the same as in training, so a score is what training would have seen. Users call
`renyi.load(folder).score`. Read next: `renyi.data.prepare`, which turns rows into tokens.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi.batches import padded
from renyi.data import Limits, Preparation, count_cut, prepare, told_cut
from renyi.ensemble import LoraEnsemble
from renyi.errors import ConfigError, DataError
from renyi.inference.scoring import check_finite, scored
from renyi.labels import IGNORED
from renyi.objectives import example_responsibilities, jensen_gap, renyi_loss

logger = logging.getLogger(__name__)


class Score(NamedTuple):
    """What an ensemble of M members says about one example. Likelihoods are in nats, summed over its trained tokens.

    Attributes:
        index: row of the dataset, counted from 0.
        tokens: trained tokens.
        log_likelihood: log p_m(y | x), [M].
        responsibilities: share of the example that each member would learn from at the ensemble's alpha, [M].
        mixture_nll: −log Σ_m π_m p_m(y | x).
        jensen_gap: mean member NLL − mixture NLL ≥ 0.
        group: the group that shares a responsibility with this row (`routing_group`); None if the rows have none.
        group_responsibilities: of that group as a whole, [M].
    """

    index: int  # type: ignore[assignment]
    tokens: int
    log_likelihood: list[float]
    responsibilities: list[float]
    mixture_nll: float
    jensen_gap: float
    group: str | None = None
    group_responsibilities: list[float] | None = None


def score(
    ensemble: LoraEnsemble,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preparation: Preparation | None = None,
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Score]:
    """Score every example of a dataset under every member.

    Args:
        ensemble: M members.
        dataset: rows of any of TRL's forms, or prepared ones (`input_ids`, and `labels` with −100 where not trained).
        tokenizer: of the base; not needed for prepared rows.
        preparation: how rows become tokens and labels. By default as in training, if the ensemble was loaded from a
            folder. Otherwise it is needed for rows that are not prepared.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single row is scored alone.
        progress: called after each batch with the number of examples done.

    Returns:
        One score a row, in the dataset's order.

    Raises:
        ConfigError: the rows are not prepared, and `tokenizer` or `preparation` is missing.
        DataError: a row is malformed, or nothing of it is trained.
        EnsembleFormatError: a member gives no finite likelihood.
    """
    if not {"input_ids", "labels"}.issubset(dataset.column_names):
        if tokenizer is None:
            raise ConfigError("is missing, and the rows are not prepared", where="tokenizer", hint="Give the base's.")
        dataset = prepared_for(ensemble, dataset, tokenizer, preparation)
    lengths = [len(ids) for batch in dataset.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]]
    _check_lengths(lengths, Limits.of(ensemble.base).positions)

    def score_batch(rows: list[int]) -> list[Score]:
        return _score_batch(ensemble, rows, dataset[rows])

    return scored(ensemble, dataset, lengths, score_batch, tokens_per_batch, progress)


def prepared_for(
    ensemble: LoraEnsemble,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    preparation: Preparation | None = None,
    name: str = "dataset",
) -> Dataset:
    """Rows as `score` takes them, cut at what the base can read; a warning says how many were cut.

    Args:
        ensemble: the rows are prepared for its base.
        dataset: rows of any of TRL's forms.
        tokenizer: of the base.
        preparation: as for `score`.
        name: what to call the dataset in errors.

    Raises:
        DataError: a row is malformed, or nothing of it is trained.
        ConfigError: as `score`.
    """
    preparation, limits = preparation or _kept_preparation(ensemble), Limits.of(ensemble.base)
    prepared = prepare(dataset, tokenizer, preparation, name, limits)
    told = told_cut(count_cut(prepared), preparation.max_length, limits)
    if told:
        logger.warning("%s", told)
    return prepared


def _check_lengths(lengths: list[int], positions: int | None) -> None:
    for row, length in enumerate(lengths, start=1):
        if positions is not None and length > positions:
            what = f"has {length:,} tokens, and the base reads {positions:,}"
            raise DataError(what, where=f"row {row}", hint="Shorten the row, or lower max_length.")


def _kept_preparation(ensemble: LoraEnsemble) -> Preparation:
    """How training prepared its rows, read from the folder that the ensemble was loaded from."""
    if ensemble.folder is None:
        raise ConfigError(
            "is missing: the rows are not prepared, and the ensemble was not loaded from a folder that says how",
            where="preparation",
            hint="Give the settings of training, or Preparation() for TRL's defaults.",
        )
    return Preparation.read(ensemble.folder)


def _score_batch(ensemble: LoraEnsemble, rows: list[int], columns: dict[str, list[list[int]]]) -> list[Score]:
    input_ids, attention_mask = padded(columns["input_ids"], 0), padded([[1] * len(x) for x in columns["labels"]], 0)
    labels = padded(columns["labels"], IGNORED)
    ell_MB = ensemble.log_likelihood(*(x.to(ensemble.device) for x in (input_ids, attention_mask, labels))).cpu()
    check_finite(ell_MB, rows)
    tokens_B = (labels[:, 1:] != IGNORED).sum(dim=1)
    return scores_of(rows, ell_MB, tokens_B, ensemble.alpha, ensemble.weights.cpu(), ensemble.routing_quantity)


def scores_of(
    rows: Sequence[int], ell_MB: Tensor, tokens_B: Tensor, alpha: float, weights: Tensor, routing_quantity: str
) -> list[Score]:
    """The scores of B rows with known log-likelihoods.

    Args:
        rows: the rows' indices, [B].
        ell_MB: log p_m(y | x), nats.
        tokens_B: trained tokens of each row.
        alpha, weights [M], routing_quantity: of the ensemble.
    """
    log_weights = weights.log()
    order = tokens_B, alpha, log_weights, routing_quantity
    return [
        Score(*values)
        for values in zip(
            rows,
            tokens_B.tolist(),
            ell_MB.T.tolist(),
            example_responsibilities(ell_MB, *order).T.tolist(),
            renyi_loss(ell_MB, 1.0, log_weights).tolist(),
            jensen_gap(ell_MB, log_weights).tolist(),
            strict=True,
        )
    ]
