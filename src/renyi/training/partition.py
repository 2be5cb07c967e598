"""The learned log Z'(q): one linear head per policy on the base's mean prompt state.

Read next: `powerflow.py`, which trains it.
"""

import torch
from torch import Tensor, nn


class LearnedPartition(nn.Module):
    """log Z'_m(q) = w_m · mean state of the prompt + b_m, for M policies.

    `w` starts at zero. `b` must be set from the first rollouts (`start_at`), or training begins with a large residual
    that says nothing about the policy: while the policy is the base, the residual is zero on average at
    log Z' = (power − 1) times the mean token log-probability.
    """

    started: Tensor

    def __init__(self, num_members: int, hidden_size: int):
        super().__init__()
        # Members are on the first dimension, as in the adapters, so that gradients are clipped by member.
        self.weight = nn.Parameter(torch.zeros(num_members, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_members, 1))
        self.register_buffer("started", torch.tensor(False))

    def start_at(self, log_partition_M: Tensor) -> None:
        """Set b. It is done once."""
        if not self.started:
            with torch.no_grad():
                self.bias.copy_(log_partition_M[:, None])
                self.started.fill_(True)

    def forward(self, prompt_state_BD: Tensor) -> Tensor:
        """log Z' [M, B] in nats, float32, from mean prompt states [B, D]."""
        return torch.einsum("md,bd->mb", self.weight, prompt_state_BD.float()) + self.bias
