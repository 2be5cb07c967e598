"""Repeats the rows of a batch once for every member, and sums the scores of the joint forward by example.

The repeated rows are member-major: all rows of member 0, then all rows of member 1, and so on. In a packed batch,
`position_ids` says where examples begin. Read next: `joint.py`, which runs the rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class JointOutput(NamedTuple):
    """The result of the joint forward. Position t of the last dimension predicts token t + 1.

    Attributes:
        log_probs: [M, B, T−1] float32, nats; zero where not trained. It has a gradient.
        label_mask: [B, T−1] bool, true where a token is trained.
        entropy: [M, B, T−1] float32, nats; zero where not trained. It has no gradient.
        is_top1: [M, B, T−1] bool, whether the token is the member's most likely one.
    """

    log_probs: Tensor
    label_mask: Tensor
    entropy: Tensor
    is_top1: Tensor


def repeat_rows(value: Any, num_members: int, batch: int) -> Any:
    """Repeat the rows of a batch once for every member, member-major. A value without rows is returned as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
        return value
    return value.repeat(num_members, *[1] * (value.dim() - 1))


def repeat_packed(inputs: dict[str, Any], num_members: int) -> dict[str, Any]:
    """Repeat one packed row [1, T] to [1, M·T]. The boundaries of its sequences are repeated with an offset."""
    length = inputs["input_ids"].shape[1]
    repeated = dict(inputs)
    for name, value in inputs.items():
        if name.startswith("cu_seq_lens"):
            starts = torch.arange(num_members, device=value.device, dtype=value.dtype)[:, None] * length
            repeated[name] = torch.cat([value[:1], (value[1:] + starts).flatten()])
        elif name == "seq_idx":
            sequences = value.max() + 1
            repeated[name] = torch.cat([value + m * sequences for m in range(num_members)], dim=1)
        elif isinstance(value, Tensor) and value.dim() == 2:
            repeated[name] = value.repeat(1, num_members)
    return repeated


def example_log_likelihood(output: JointOutput, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum token log-probabilities by example.

    A row is one example. A packed row holds several examples; each begins where `position_ids` is 0.

    Args:
        output: the joint forward's output for B rows of T tokens.
        position_ids: [B, T] of a packed batch; None if each row is one example.

    Returns:
        Log-likelihoods [M, E] in nats and numbers of trained tokens [E], of the E examples with trained tokens.
    """
    tokens_BT = output.label_mask
    if position_ids is None:
        ell_ME, tokens_E = output.log_probs.sum(dim=-1), tokens_BT.sum(dim=-1)
    else:
        example_BT = (position_ids == 0).flatten().cumsum(0).view_as(position_ids)[:, 1:] - 1
        num_examples = int(example_BT.max()) + 1
        index = example_BT.flatten()
        ell_ME = output.log_probs.new_zeros(output.log_probs.shape[0], num_examples)
        ell_ME = ell_ME.index_add(1, index, output.log_probs.flatten(1))
        tokens_E = tokens_BT.new_zeros(num_examples, dtype=torch.long).index_add(0, index, tokens_BT.flatten().long())
    trained = tokens_E > 0
    return ell_ME[:, trained], tokens_E[trained]
