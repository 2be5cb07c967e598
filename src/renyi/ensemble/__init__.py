"""M adapters on one base: build, load and save them; the joint forward; sequence log-likelihoods."""

from renyi.ensemble.decode import MIXTURES, Generation
from renyi.ensemble.ensemble import LoraEnsemble
from renyi.ensemble.member_rows import JointOutput, example_log_likelihood
from renyi.ensemble.modes import evaluating
from renyi.ensemble.pool import BaseScore
from renyi.ensemble.reference import Reference, completion_labels, read_preference, write_preference

__all__ = [
    "MIXTURES",
    "BaseScore",
    "Generation",
    "JointOutput",
    "LoraEnsemble",
    "Reference",
    "completion_labels",
    "evaluating",
    "example_log_likelihood",
    "read_preference",
    "write_preference",
]
