"""The strength of ties that training on votes takes from its data. Read next: `renyi.objectives.votes`."""

from typing import Any

import torch
from datasets import Dataset

from renyi import data
from renyi.errors import ConfigError
from renyi.objectives import Votes, tie_strength_of


def settled_tie_strength(given: float | None, rows: Any) -> float:
    """ν: as it was given, or the value at which equals tie as often as the labels of the training data do.

    Args:
        given: the setting `tie_strength`.
        rows: the prepared training data.

    Raises:
        ConfigError: there are ties and ν is 0; or the votes are not known before training.
    """
    if data.VOTE_COLUMNS[0] not in (rows.column_names or ()):
        return given or 0.0
    if not isinstance(rows, Dataset):
        if given is None:
            raise ConfigError(
                "is not set, and the votes of a streamed dataset are not counted",
                where="tie_strength",
                hint="Write 0 if there are no ties, or twice the number of ties for each other label.",
            )
        return given
    if not has_ties(rows):
        return given or 0.0
    if given == 0:
        raise ConfigError(
            "0 leaves a tie no probability, and some votes are ties",
            where="tie_strength",
            hint="Leave it out, or give a number above 0.",
        )
    return given or tie_strength_of(Votes(*(torch.tensor(rows[column]) for column in data.VOTE_COLUMNS)))


def has_ties(rows: Dataset) -> bool:
    """Whether a label of prepared rows is a tie."""
    tie = data.VOTE_COLUMNS[2]
    return tie in rows.column_names and any(rows[tie])
