"""One step of decoding: from the members' logits to the next token, its uncertainty and the weights after it.

`decode.py` calls it for a batch of prompts that begin together; the server calls it for each request by itself. So both
choose the same tokens. Read next: `decode.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi.errors import EnsembleFormatError
from renyi.measures import DrawUncertainty, TokenUncertainty, draw_uncertainty, token_uncertainty
from renyi.objectives import mixture_logits, running_log_weights


class TokenChoice(NamedTuple):
    """How a token is chosen from the mixture's scores.

    Attributes:
        processors: transformers' list of logits processors, called with the ids so far and the scores.
        do_sample: whether to draw the token, or to take the likeliest.
        generator: of the draws; None is torch's global generator.
    """

    processors: Any
    do_sample: bool
    generator: torch.Generator | None

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """The chosen tokens [B]."""
        scores_BV = self.processors(ids_BT, scores_BV)
        if self.do_sample:
            return torch.multinomial(scores_BV.softmax(-1), 1, generator=self.generator).squeeze(1)
        return scores_BV.argmax(-1)


class Step(NamedTuple):
    """What one step gives for B rows of K members.

    Attributes:
        tokens: [B], the next tokens.
        log_probs: [K, B] float64, log p_m of these tokens, nats.
        log_weights: [K, B] float64, the running weights after these tokens.
        uncertainty: of the mixture about the next token, [B].
        log_p: [K, B, V] float32, the members' distributions.
        parts: what of the epistemic uncertainty lies within and between members, [B]; None unless they are draws.
    """

    tokens: Tensor
    log_probs: Tensor
    log_weights: Tensor
    uncertainty: TokenUncertainty
    log_p: Tensor
    parts: DrawUncertainty | None


def step(
    logits_KBV: Tensor,
    log_w_KB: Tensor,
    ids_BT: Tensor,
    choice: TokenChoice | Callable[[Tensor, Tensor], Tensor],
    by_token: bool = False,
    unfinished_B: Tensor | None = None,
    pad: Tensor | None = None,
    num_draws: int = 1,
) -> Step:
    """Mix the members' distributions, choose a token, and count it in the running weights.

    Args:
        logits_KBV: each member's logits of the next token.
        log_w_KB: the running weights, normalised, float64.
        ids_BT: prompts and answers so far, for the processors.
        choice: how the tokens are chosen, from the ids so far and the scores, such as a `TokenChoice`.
        by_token: whether the weights stay as they are.
        unfinished_B: False for rows that have ended, which get the token `pad`. None if no row has.
        pad: a scalar.
        num_draws: how many members, one after another, are draws of one.

    Raises:
        EnsembleFormatError: a member's logits are NaN.
    """
    num_members, batch, _ = logits_KBV.shape
    log_p_KBV = logits_KBV.log_softmax(-1, dtype=torch.float32)
    _check_numbers(log_p_KBV)
    token_B = choice(ids_BT, mixture_logits(logits_KBV, log_p_KBV, log_w_KB))
    if unfinished_B is not None:
        token_B = torch.where(unfinished_B, token_B, pad if pad is not None else token_B.new_zeros(()))
    log_p_KB = log_p_KBV.gather(-1, token_B.expand(num_members, batch)[..., None]).squeeze(-1).double()
    after_KB = log_w_KB
    if not by_token:
        after_KB = running_log_weights(log_w_KB, log_p_KB)
        if unfinished_B is not None:
            after_KB = torch.where(unfinished_B, after_KB, log_w_KB)
    parts = draw_uncertainty(log_p_KBV, log_w_KB, num_draws) if num_draws > 1 else None
    return Step(token_B, log_p_KB, after_KB, token_uncertainty(log_p_KBV, log_w_KB), log_p_KBV, parts)


def _check_numbers(log_p_KBV: Tensor) -> None:
    """Raise `EnsembleFormatError` if a distribution holds NaN. One logit that is NaN makes the whole row NaN."""
    broken_KB = log_p_KBV[..., 0].isnan()
    if broken_KB.any():
        member = int(broken_KB.any(-1).nonzero()[0])
        who = f"member {member}" if len(broken_KB) > 1 else "the model"
        raise EnsembleFormatError(
            f"{who} gives logits that are not numbers",
            where="generate",
            hint="Its training diverged, or the base is loaded in a precision too low for it.",
        )
