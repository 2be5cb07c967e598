"""What the folder of an ensemble of reward models keeps beside its members: what each member's rewards are centred by.

Read next: `objectives/reward.py`, which says why rewards have to be centred.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.ensemble.ensemble import LoraEnsemble
from renyi.errors import EnsembleFormatError
from renyi.layout import REWARD_FILE


class KeptReward(NamedTuple):
    """What rewards and votes are computed with after training.

    Attributes:
        center: each member's mean reward over training pairs, [M].
        tie_strength: ν of votes, see `renyi.objectives.votes`; 0 if no training label was a tie.
    """

    center: Tensor
    tie_strength: float = 0.0


def write_reward(folder: str | Path, kept: KeptReward) -> None:
    """Write it into an ensemble's folder."""
    text = json.dumps({"center": kept.center.tolist(), "tie_strength": kept.tie_strength}, indent=2) + "\n"
    (Path(folder) / REWARD_FILE).write_text(text, encoding="utf-8")


def read_reward(folder: str | Path, ensemble: LoraEnsemble) -> KeptReward:
    """Read it for an ensemble of reward models. Without a file, rewards are not centred.

    Raises:
        EnsembleFormatError: the members are no reward models, or the file is damaged or of another number of members.
    """
    if not ensemble.gives_rewards:
        hint = "Train some by `renyi reward`."
        raise EnsembleFormatError("holds no reward models", where=str(folder), hint=hint)
    file = Path(folder) / REWARD_FILE
    if not file.is_file():
        return KeptReward(torch.zeros(ensemble.num_members))
    hint = "Copy it again from where the ensemble was trained."
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        center, ties = torch.tensor([float(x) for x in kept["center"]]), float(kept.get("tie_strength", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EnsembleFormatError(f"cannot be read ({error})", where=str(file), hint=hint) from error
    center = center.repeat_interleave(ensemble.num_draws)  # draws have that of their member
    if len(center) != ensemble.num_members:
        what = f"is of {len(center)} members, not {ensemble.num_members}"
        raise EnsembleFormatError(what, where=str(file), hint=hint)
    return KeptReward(center, ties)
