"""What a target is a power of: the frozen base, or a trained ensemble's members, pooled.

Knows members and rows of tokens; nothing about rollouts, powers or training.
"""

import torch
from torch import Tensor

from renyi.ensemble.ensemble import LoraEnsemble, Snapshot
from renyi.errors import ConfigError

POOLS = ("arithmetic", "geometric", "member")


class BaseScore:
    """Log-likelihoods of whole trajectories under the base, or under a pool of members that are kept frozen beside it.

    Args:
        ensemble: on whose base the members live.
        members: they; None for the base alone.
        pool: "arithmetic", the mixture of sequences log Σ_k π_k p_k(y); "geometric", Σ_k π_k log p_k(y), which is not
            normalised; or "member", each policy by the member of its number.

    Raises:
        ConfigError: another pool; or one member a policy, and there are more of one than of the other.
    """

    def __init__(self, ensemble: LoraEnsemble, members: Snapshot | None = None, pool: str = "arithmetic"):
        if pool not in POOLS:
            raise ConfigError(
                f"{pool!r} is not allowed", where="reference_pool", hint=f"Give one of {', '.join(POOLS)}."
            )
        if members is not None and pool == "member" and len(members.weights) != ensemble.num_members:
            raise ConfigError(
                f"'member' needs one member a policy: there are {len(members.weights)} members and "
                f"{ensemble.num_members} policies",
                where="reference_pool",
                hint=f"Set num_members to {len(members.weights)}.",
            )
        self.ensemble, self.members, self.pool = ensemble, members, pool

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Nats, summed over the tokens that `labels` trains: [1, B], or [M, B] if every policy has its own."""
        acting = self.ensemble.using(()) if self.members is None else self.ensemble.acting_as(self.members)
        with acting:
            ell_KB = self.ensemble(input_ids, attention_mask, labels).log_probs.sum(dim=-1)
        if self.members is None or self.pool == "member":
            return ell_KB
        weights_K1 = self.members.weights.to(ell_KB)[:, None]
        if self.pool == "geometric":
            return (weights_K1 * ell_KB).sum(dim=0, keepdim=True)
        return torch.logsumexp(weights_K1.log() + ell_KB, dim=0, keepdim=True)
