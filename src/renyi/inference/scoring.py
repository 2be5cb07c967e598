"""The loop of what scores prepared rows: batches of similar length, all members in each, one score a row.

`score.py`, `pair_scores.py` and `thumb_scores.py` say what the score of a row is.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from datasets import Dataset
from torch import Tensor

from renyi.batches import batches_by_length
from renyi.data import CompletionPreparation, Limits, told_cut
from renyi.ensemble import LoraEnsemble
from renyi.errors import EnsembleFormatError
from renyi.inference.group_scores import Scored, with_groups

logger = logging.getLogger(__name__)

Cut = TypeVar("Cut", bound=CompletionPreparation)


def scored(
    ensemble: LoraEnsemble,
    rows: Dataset,
    lengths: Sequence[int],
    score_batch: Callable[[list[int]], list[Scored]],
    tokens_per_batch: int,
    progress: Callable[[int], object],
    rows_per_example: int = 1,
) -> list[Scored]:
    """One score a row, in the dataset's order; with the scores of groups if the rows have groups.

    Args:
        ensemble: M members. They act in evaluation mode, on a half-precision base in its precision, without gradients.
        rows: prepared.
        lengths: of each row, tokens.
        score_batch: scores some rows by their indices.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single row is scored alone.
        progress: called after each batch with the number of rows done.
        rows_per_example: 2 if a forward has two rows for each row of the dataset.
    """
    scores: list[Scored] = []
    with ensemble.inference(), torch.inference_mode():
        for batch in batches_by_length(lengths, tokens_per_batch // (rows_per_example * ensemble.num_members)):
            scores += score_batch(batch)
            progress(len(scores))
    return with_groups(sorted(scores, key=lambda score: score.index), rows, ensemble)


def check_finite(values_MB: Tensor, rows: Sequence[int], what: str = "log-likelihood", where: str = "row") -> None:
    """Raise `EnsembleFormatError` for the first row of which a member's value is no finite number.

    Args:
        values_MB: of each member and row [M, B].
        rows: the numbers of the rows, from 0.
        what: the values are.
        where: what a row is called.
    """
    bad_B = ~values_MB.isfinite().all(dim=0)
    if bad_B.any():
        raise EnsembleFormatError(
            f"a member's {what} is no finite number",
            where=f"{where} {rows[int(bad_B.nonzero()[0])] + 1}",
            hint="Its training diverged, or the base is loaded in a precision too low for it.",
        )


def cut_to_fit(
    ensemble: LoraEnsemble, rows: Dataset, preparation: Cut, count_cut: Callable[[Dataset, Cut], int]
) -> Cut:
    """The preparation, which cuts rows at the positions of the base at the latest. A warning counts those that are cut.

    Args:
        ensemble: whose base reads the rows.
        rows: prepared.
        preparation: says where rows are cut.
        count_cut: counts the rows that a preparation cuts.
    """
    limits = Limits.of(ensemble.base)
    fitting = preparation.within(limits)
    if told := told_cut(count_cut(rows, fitting), preparation.max_length, limits):
        logger.warning("%s", told)
    return fitting
