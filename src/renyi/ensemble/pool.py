"""The distribution p of which PowerFlow's target is a power: the frozen base, or a pool of a trained ensemble.

Read next: `training/powerflow.py`, which trains toward the target.
"""

import torch
from torch import Tensor

from renyi.ensemble.ensemble import LoraEnsemble, Snapshot
from renyi.errors import ConfigError

POOLS = ("arithmetic", "geometric", "member")


class BaseScore:
    """Log-likelihoods of whole trajectories under the base, or under a pool of frozen members on the same base.

    Args:
        ensemble: the policies, whose base is used.
        members: the frozen members of the pool; None for the base alone.
        pool: how the K members are pooled. "arithmetic" is the mixture of sequences, log Σ_k π_k p_k(y). "geometric" is
            Σ_k π_k log p_k(y), which is not normalised. "member" gives each policy the member with the same number.

    Raises:
        ConfigError: `pool` is unknown; or it is "member" and the numbers of members and policies differ.
    """

    def __init__(self, ensemble: LoraEnsemble, members: Snapshot | None = None, pool: str = "arithmetic"):
        if pool not in POOLS:
            raise ConfigError(
                f"{pool!r} is not allowed", where="reference_pool", hint=f"Give one of {', '.join(POOLS)}."
            )
        if members is not None and pool == "member" and len(members.weights) != ensemble.num_members:
            raise ConfigError(
                f"'member' needs one member per policy: there are {len(members.weights)} members and "
                f"{ensemble.num_members} policies",
                where="reference_pool",
                hint=f"Set num_members to {len(members.weights)}.",
            )
        self.ensemble, self.members, self.pool = ensemble, members, pool

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihoods in nats, summed over the tokens with labels: [1, B], or [M, B] for the pool "member"."""
        acting = self.ensemble.using(()) if self.members is None else self.ensemble.acting_as(self.members)
        with acting:
            ell_KB = self.ensemble(input_ids, attention_mask, labels).log_probs.sum(dim=-1)
        if self.members is None or self.pool == "member":
            return ell_KB
        weights_K1 = self.members.weights.to(ell_KB)[:, None]
        if self.pool == "geometric":
            return (weights_K1 * ell_KB).sum(dim=0, keepdim=True)
        return torch.logsumexp(weights_K1.log() + ell_KB, dim=0, keepdim=True)
