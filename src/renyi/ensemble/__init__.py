"""M adapters on one frozen base: build, load and save them, run the joint forward, and decode.

Read in this order: `ensemble.py` (the class `LoraEnsemble`), `joint.py` (the joint forward), `head.py` (token scores
without logits in memory), `decode.py` (generation). `storage.py` and `describe.py` read and write folders;
`curvature.py` is for diagnosis.
"""

from renyi.ensemble.decode import MIXTURES, Generation
from renyi.ensemble.ensemble import LoraEnsemble
from renyi.ensemble.kept_reward import KeptReward, read_reward, write_reward
from renyi.ensemble.member_rows import JointOutput, example_log_likelihood
from renyi.ensemble.modes import evaluating
from renyi.ensemble.pool import BaseScore
from renyi.ensemble.reference import (
    KeptThumbs,
    Reference,
    completion_labels,
    needed_thumbs,
    read_preference,
    read_thumbs,
    write_preference,
    write_thumbs,
)

__all__ = [
    "MIXTURES",
    "BaseScore",
    "Generation",
    "JointOutput",
    "KeptReward",
    "KeptThumbs",
    "LoraEnsemble",
    "Reference",
    "completion_labels",
    "evaluating",
    "example_log_likelihood",
    "needed_thumbs",
    "read_preference",
    "read_reward",
    "read_thumbs",
    "write_preference",
    "write_reward",
    "write_thumbs",
]
