"""What each policy writes by itself: new rollouts, and how likely they are under policy and base.

`renyi powerflow` ends with these figures. Read next: `renyi.training.powerflow`, how a policy is tuned.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi.batches import padded
from renyi.ensemble import Generation, LoraEnsemble
from renyi.inference.generate import end_tokens
from renyi.labels import IGNORED

# A rollout is a sample of the policy itself. These override the base's generation config.
_ITSELF = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class PolicySummary(NamedTuple):
    """One policy over rollouts of its own.

    Attributes:
        log_base: their log-probability under the base that was given, nats a token.
        log_policy: under the policy itself, nats a token.
        mean_length: tokens a rollout, the end of text included.
        truncated: share of the rollouts that did not end within the longest length.
        slope: regression slope of the policy's log-probability a token on the base's, over the policy's rollouts of a
            prompt and the frozen base's. It is 1 for the base itself, and the power at a length-aware target, for any
            log Z'. NaN if all rollouts have the same log-probability.
        first: the text of each prompt's first rollout.
    """

    log_base: float
    log_policy: float
    mean_length: float
    truncated: float
    slope: float
    first: list[str]


@torch.no_grad()
def summarise_policies(
    ensemble: LoraEnsemble,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    base_score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    rollouts: int = 8,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[PolicySummary]:
    """Let the frozen base and each of M policies answer the same prompts, and sum up what they wrote: the base first.

    All draw with the same random numbers, so that texts differ only if distributions differ.

    Args:
        ensemble: M policies.
        prompts: token ids of P prompts.
        tokenizer: of the base.
        base_score: nats [1 or M, B] of trajectories, from (input_ids, attention_mask, labels); a policy m that has a
            row of its own is measured by that.
        rollouts: of each prompt.
        max_new_tokens: tokens after which a rollout is cut.
        seed: of the draws.
    """
    rows = [list(ids) for ids in prompts for _ in range(rollouts)]
    ends = end_tokens(ensemble, tokenizer)
    settings: dict[str, Any] = {**_ITSELF, "max_new_tokens": max_new_tokens, "seed": seed}
    settings |= {"pad_token_id": tokenizer.pad_token_id or 0, **({"eos_token_id": ends} if ends else {})}
    input_ids, attention_mask = padded(rows, 0), padded([[1] * len(ids) for ids in rows], 0)
    written: list[list[list[int]]] = []  # by the base, and by each policy
    summaries: list[PolicySummary] = []
    for member in (None, *range(ensemble.num_members)):
        chosen = () if member is None else (member,)
        with ensemble.using(chosen):
            made = ensemble.generate(input_ids, attention_mask, **settings)
        written.append(_written(made))
        # Both the base's rollouts and the policy's own: a collapsed policy would never write some of the base's.
        both = [x.to(ensemble.device) for x in _trajectories([*rows, *rows], [*written[0], *written[-1]])]
        with ensemble.using(chosen):
            log_policy = ensemble.log_likelihood(*both)[0].cpu().double().unflatten(0, (2, -1))
        log_base_K = base_score(*both).cpu().double()
        log_base = log_base_K[(member or 0) if len(log_base_K) > 1 else 0].unflatten(0, (2, -1))
        tokens = torch.tensor([[len(ids) for ids in of] for of in (written[0], written[-1])])
        summaries.append(
            PolicySummary(
                log_base=float(log_base[1].sum() / tokens[1].sum()),
                log_policy=float(log_policy[1].sum() / tokens[1].sum()),
                mean_length=float(tokens[1].double().mean()),
                truncated=sum(ids[-1] not in ends for ids in written[-1]) / len(rows),
                slope=_slope(log_policy / tokens, log_base / tokens, rollouts),
                first=[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written[-1][::rollouts]],
            )
        )
    return summaries


def _slope(y_2B: Tensor, x_2B: Tensor, rollouts: int) -> float:
    """Least squares of y on x. Each prompt has an intercept, which accounts for its log Z'."""
    x, y = (v.unflatten(1, (-1, rollouts)) for v in (x_2B, y_2B))
    x, y = (v - v.mean(dim=(0, 2), keepdim=True) for v in (x, y))
    spread = x.square().sum()
    return float((x * y).sum() / spread) if spread > 1e-12 else float("nan")


def _written(generation: Generation) -> list[list[int]]:
    tokens_B, mask_B = generation.new_tokens.cpu(), generation.mask.cpu()
    return [tokens[mask].tolist() for tokens, mask in zip(tokens_B, mask_B, strict=True)]


def _trajectories(prompts: list[list[int]], written: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels [B, T] of prompts with what was written, padded on the right."""
    both = list(zip(prompts, written, strict=True))
    return (
        padded([[*x, *y] for x, y in both], 0),
        padded([[1] * (len(x) + len(y)) for x, y in both], 0),
        padded([[IGNORED] * len(x) + y for x, y in both], IGNORED),
    )
