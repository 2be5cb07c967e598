"""M adapters on one base: build, load and save them; the joint forward; sequence log-likelihoods."""

from renyi.ensemble.ensemble import JointOutput, LoraEnsemble, example_log_likelihood

__all__ = ["JointOutput", "LoraEnsemble", "example_log_likelihood"]
