"""What an ensemble trainer minimises: the α-Rényi loss at the scheduled order, a prior, and M times the gradient.

A trainer says what the log-likelihood of an example is. What follows from it is here. Read next:
`renyi.objectives.mixture` (the loss itself), `schedule.py` (the schedule of alpha).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi.ensemble import LoraEnsemble
from renyi.objectives import example_loss, example_responsibilities, group_sums, renyi_loss, responsibilities
from renyi.routing import BatchGroups
from renyi.training.mixture_weights import LearnMixtureWeights
from renyi.training.schedule import scheduled_alpha


class Prior(NamedTuple):
    """(1/M) Σ_m KL(member m, its prior), counted once over the whole training set.

    Attributes:
        divergence: KL of each member that this process holds from its prior [M], nats, with a graph.
        units: how many units (tokens, or pairs) of the training data the reported loss is a mean over.
    """

    divergence: Callable[[], Tensor]
    units: int

    def __call__(self) -> Tensor:
        """The prior's part of a step's loss, a scalar: the mean over the members that this process holds."""
        return self.divergence().mean() / self.units


class Objective:
    """The α-Rényi objective of an ensemble (Soft Specialists, arXiv 2605.27747).

    Args:
        ensemble: the members, whose mixture weights the loss uses.
        args: an `EnsembleConfig`: alpha, its schedule, and what is routed.
        prior: pulls members back to where they began; None for no prior.
        learned_weights: what learns the mixture weights from responsibilities; None for fixed weights.
    """

    def __init__(
        self,
        ensemble: LoraEnsemble,
        args: Any,
        prior: Prior | None = None,
        learned_weights: LearnMixtureWeights | None = None,
    ):
        self.ensemble, self.args, self.prior, self.learned_weights = ensemble, args, prior, learned_weights

    @classmethod
    def of(
        cls, ensemble: LoraEnsemble, args: Any, units: Callable[[], int], reduce: Callable[[Any], Any]
    ) -> "Objective":
        """The objective that an `EnsembleConfig` asks for. A prior is also kept on the ensemble, which records it.

        Args:
            ensemble: the members.
            args: the config.
            units: counts the units of the training data, if there is a prior.
            reduce: sums a tensor over processes.
        """
        learned, prior = None, None
        if args.mixture_weights == "learned":
            learned = LearnMixtureWeights(ensemble, reduce, args.mixture_weights_rate)
        if args.prior_std is not None:
            prior = Prior(ensemble.stack.prior(args.prior_std), units())
            ensemble.prior = prior.divergence
        return cls(ensemble, args, prior, learned)

    def alpha(self, progress: float) -> float:
        """The order after this share of training, in [0, 1]."""
        return scheduled_alpha(progress, self.args.alpha, self.args.alpha_hold_ratio, self.args.alpha_ramp_ratio)

    def of_examples(self, ell_ME: Tensor, tokens_E: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """The α-Rényi loss [E] of examples, nats, and their responsibilities [M, E].

        Args:
            ell_ME: log-likelihoods, nats.
            tokens_E: trained tokens, which length-normalised routing divides by.
            alpha: the order.

        With S draws of each member, all of this has M·S instead of M, and the loss is
        −(1/α) log (1/S) Σ_m π_m Σ_s exp(α ℓ_ms).
        """
        given = tokens_E, alpha, self.ensemble.drawn_weights.log(), self.args.routing_quantity
        return example_loss(ell_ME, *given), example_responsibilities(ell_ME.detach(), *given)

    def of_groups(self, ell_ME: Tensor, groups: BatchGroups, alpha: float) -> tuple[Tensor, Tensor]:
        """The loss [G] of the groups of a batch, nats, and the responsibilities [M, E] of its examples.

        The examples of a group share one responsibility, that of all rows of the group. The loss of a group is what
        the batch's rows add to the loss of its other rows, as far as these are known.

        Args:
            ell_ME: log-likelihoods of the batch's examples, nats.
            groups: the group of each example, and what is known of the groups' other rows.
            alpha: the order.
        """
        log_weights_M1 = self.ensemble.weights.log()[:, None]
        others_MG = groups.others.to(self.ensemble.weights.device, torch.float64)
        prior_MG = (log_weights_M1 + alpha * others_MG).log_softmax(dim=0).to(ell_ME.dtype)
        group_E = groups.of_rows.to(ell_ME.device)
        ell_MG = group_sums(ell_ME, group_E, others_MG.shape[1])
        r_MG = responsibilities(ell_MG.detach(), alpha, prior_MG)
        return renyi_loss(ell_MG, alpha, prior_MG), r_MG[:, group_E]

    def of_members(self, r_ME: Tensor) -> Tensor:
        """Responsibilities [M, E] of members: the sums of those of their draws [M·S, E]."""
        return r_ME.unflatten(0, (-1, self.ensemble.draws)).sum(dim=1)

    def prior_weight(self, progress: float) -> float:
        """The factor on the prior after this share of training: it rises from 0 to 1 over `kl_warmup_ratio`."""
        warmup = self.args.kl_warmup_ratio
        return min(1.0, progress / warmup) if warmup > 0 else 1.0

    def of_batch(self, loss: Tensor, r_ME: Tensor, share_of_step: float | None, progress: float = 1.0) -> Tensor:
        """The loss of a micro-batch with the prior, and with M times its gradient.

        Responsibilities sum to one, so that a member's share of the plain gradient is about 1/M.

        Args:
            loss: of the micro-batch.
            r_ME: responsibilities, which mixture weights are learned from.
            share_of_step: the part of an optimizer step that this micro-batch is; None in evaluation.
            progress: the share of training that is done.
        """
        loss = scale_gradient(loss, self.ensemble.num_members)
        if share_of_step is None:
            return loss
        if self.prior is not None:
            prior = self.prior_weight(progress) * share_of_step * self.prior()
            loss = loss + scale_gradient(prior, len(self.ensemble.members))
        if self.learned_weights is not None:
            self.learned_weights.add(self.of_members(r_ME))
        return loss


def scale_gradient(loss: Tensor, factor: float) -> Tensor:
    """`loss`, unchanged in value, with `factor` times its gradient."""
    return loss.detach() + factor * (loss - loss.detach())
