"""What the folder of an ensemble of reward models keeps beside its members: what each member's rewards are centred by.

Read next: `objectives/reward.py`, which says why rewards have to be centred.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.errors import EnsembleFormatError
from renyi.layout import REWARD_FILE


class KeptReward(NamedTuple):
    """Each member's mean reward over training pairs, [M]."""

    center: Tensor


def write_reward(folder: str | Path, kept: KeptReward) -> None:
    """Write it into an ensemble's folder."""
    text = json.dumps({"center": kept.center.tolist()}, indent=2) + "\n"
    (Path(folder) / REWARD_FILE).write_text(text, encoding="utf-8")


def read_reward(folder: str | Path, num_members: int) -> KeptReward | None:
    """Read it; None if the folder has none.

    Raises:
        EnsembleFormatError: the file is damaged, or of another number of members.
    """
    file = Path(folder) / REWARD_FILE
    if not file.is_file():
        return None
    hint = "Copy it again from where the ensemble was trained."
    try:
        center = torch.tensor([float(x) for x in json.loads(file.read_text(encoding="utf-8"))["center"]])
    except (ValueError, TypeError, KeyError) as error:
        raise EnsembleFormatError(f"cannot be read ({error})", where=str(file), hint=hint) from error
    if len(center) != num_members:
        raise EnsembleFormatError(f"is of {len(center)} members, not {num_members}", where=str(file), hint=hint)
    return KeptReward(center)
