"""Independent samples of what may follow a prompt, and the probability with which each was drawn.

A temperature or a nucleus changes the distribution that is sampled from. This file reports the distribution that each
token was drawn from; `generate.py` reports the mixture itself. Read next: `generate.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from renyi.batches import batches_by_length, padded
from renyi.ensemble import LoraEnsemble
from renyi.errors import EnsembleFormatError
from renyi.inference.generate import Prompt, end_tokens, generate, prompt_ids
from renyi.labels import IGNORED

# The base's generation config may set any of these. Then a sample would not come from the model's own distribution.
_PLAIN: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class Draw(NamedTuple):
    """One sample of T tokens.

    Attributes:
        text: without special tokens.
        token_ids: [T], the end-of-text token, if there is one, included.
        log_prob: Σ_t log q(y_t | y_<t), nats. q is what was sampled from, with temperature and nucleus. It and the next
            two are None for a sample of unknown origin.
        entropy: Σ_t H[q(· | y_<t)], nats. Its mean over samples estimates the entropy of samples. The mean of −log_prob
            does so too, with more variance.
        truncated: whether it was cut at the greatest number of tokens.
    """

    text: str
    token_ids: list[int]
    log_prob: float | None
    entropy: float | None
    truncated: bool | None


def draw_samples(
    ensemble: LoraEnsemble,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[Draw]]:
    """Draw K independent samples for each of P prompts, from the mixture of sequences.

    Of the base's generation config only the end tokens are used. So at temperature 1 and top-p 1 a sample comes from
    the model's own distribution.

    Args:
        ensemble: M members, or with `ensemble.using` some of them, or the base alone.
        prompts: as for `generate`.
        tokenizer: of the base.
        samples: K ≥ 1.
        max_new_tokens: after which a sample is cut.
        temperature: of the mixture, above 0.
        top_p: a token is drawn from the fewest likeliest tokens that together have at least this probability.
        batch_size: prompts sampled together, each in K rows.
        seed: of the first batch, plus one for each further one; None is torch's global generator.
        progress: called after each batch with the number of prompts done.

    Returns:
        [P][K].

    Raises:
        DataError: a prompt has no token, or its messages do not fit the chat template.
    """
    for number, prompt in enumerate(prompts, start=1):  # check all prompts before the first is answered
        prompt_ids(prompt, tokenizer, number)
    ends = set(end_tokens(ensemble, tokenizer))
    warpers: list[LogitsProcessor] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_p != 1:
        warpers.append(TopPLogitsWarper(top_p))
    found: list[list[Draw]] = []
    for batch, start in enumerate(range(0, len(prompts), batch_size)):
        rows = [prompt for prompt in prompts[start : start + batch_size] for _ in range(samples)]
        seen = _Seen()
        answers = generate(
            ensemble,
            rows,
            tokenizer,
            batch_size=len(rows),
            seed=None if seed is None else seed + batch,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([*warpers, seen]),
            on_token=seen.on_token,
            **_PLAIN,
        )
        draws = []
        for answer, log_prob, entropy in zip(answers, seen.log_prob(), seen.entropy(), strict=True):
            ids = answer.token_ids
            nats = [float(values[: len(ids)].sum()) for values in (log_prob, entropy)]
            draws.append(Draw(answer.text, ids, nats[0], nats[1], truncated=ids[-1] not in ends))
        found += [draws[i : i + samples] for i in range(0, len(draws), samples)]
        progress(len(found))
    return found


class _Seen(LogitsProcessor):
    """Records the distribution that each token is drawn from. It runs after all other logits processors."""

    def __init__(self) -> None:
        self._log_probs: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._log_p_BV = scores.float().log_softmax(-1)
        self._entropies.append(torch.special.entr(self._log_p_BV.exp()).sum(-1))
        return scores

    def on_token(self, token_B: Tensor, uncertainty: object) -> None:
        self._log_probs.append(self._log_p_BV.gather(-1, token_B[:, None])[:, 0])

    def log_prob(self) -> Tensor:
        """[B, N], including the tokens after the end of a sample."""
        return torch.stack(self._log_probs, -1).double().cpu()

    def entropy(self) -> Tensor:
        return torch.stack(self._entropies, -1).double().cpu()


def base_log_likelihood(
    ensemble: LoraEnsemble,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """log p_base(continuation | context) of each, nats; 0 for a continuation without tokens.

    Args:
        ensemble: its base is used, without members.
        contexts: token ids of each context, at least one.
        continuations: token ids of each continuation.
        tokens_per_batch: limit on rows × length in one forward. A longer single row is scored alone.
        progress: called after each batch with the number of continuations done.

    Raises:
        EnsembleFormatError: the base gives no finite likelihood.
    """
    found = [0.0] * len(contexts)
    filled = [i for i, (_, y) in enumerate(zip(contexts, continuations, strict=True)) if y]
    done = len(found) - len(filled)
    with ensemble.inference(), torch.inference_mode(), ensemble.using(()):
        for batch in batches_by_length([len(contexts[i]) + len(continuations[i]) for i in filled], tokens_per_batch):
            rows = [filled[b] for b in batch]
            pairs = [(contexts[i], continuations[i]) for i in rows]
            input_ids = padded([[*x, *y] for x, y in pairs], 0)
            mask = padded([[1] * (len(x) + len(y)) for x, y in pairs], 0)
            labels = padded([[*[IGNORED] * len(x), *y] for x, y in pairs], IGNORED)
            (ell_B,) = ensemble.log_likelihood(*(x.to(ensemble.device) for x in (input_ids, mask, labels))).tolist()
            for row, ell in zip(rows, ell_B, strict=True):
                if not math.isfinite(ell):
                    raise EnsembleFormatError(
                        "its log-likelihood under the base is no finite number",
                        where=f"continuation {row + 1}",
                        hint="The base is loaded in a precision too low for it.",
                    )
                found[row] = ell
            done += len(rows)
            progress(done)
    return found
