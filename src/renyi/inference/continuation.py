"""How likely continuations are under the mixture, and whether it would choose them greedily.

Token ids in, nats out. Read next: `lm_eval.py`, which uses it for lm-evaluation-harness.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.batches import batches_by_length
from renyi.ensemble import LoraEnsemble
from renyi.errors import DataError, EnsembleFormatError
from renyi.objectives import running_log_weights


class ContinuationScore(NamedTuple):
    """What an ensemble of M members says about one continuation y of a context x.

    Attributes:
        log_likelihood: of the mixture of sequences, log Σ_m π_m p_m(y | x), nats.
        is_greedy: whether each token is the mixture's likeliest, given the tokens before it.
        member_log_likelihood: log p_m(y | x), [M], nats.
    """

    log_likelihood: float
    is_greedy: bool
    member_log_likelihood: list[float]


def score_continuations(
    ensemble: LoraEnsemble,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> list[ContinuationScore]:
    """Score a continuation of each context.

    Token by token the mixture of sequences is Σ_m w_m p_m, where w_m is π_m p_m(y_<t | x) up to a constant: members
    that explained the tokens so far count more.

    Args:
        ensemble: M members.
        contexts: token ids of each context, at least one.
        continuations: token ids of each continuation, at least one.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single row is scored alone.
        progress: called after each batch with the number of continuations done.

    Raises:
        DataError: a context or a continuation is empty.
        EnsembleFormatError: a member gives no finite likelihood.
    """
    for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True), start=1):
        if not context or not continuation:
            what = "continuation" if context else "context"
            raise DataError("holds no token", where=f"{what} {number}", hint="Give at least one token of each.")
    found: dict[int, ContinuationScore] = {}
    with ensemble.inference(), torch.inference_mode():
        lengths = [len(x) + len(y) - 1 for x, y in zip(contexts, continuations, strict=True)]
        for rows in batches_by_length(lengths, tokens_per_batch // ensemble.num_members):
            pairs = [([*contexts[i], *continuations[i]], len(continuations[i])) for i in rows]
            for row, scored in zip(rows, _score_batch(ensemble, pairs), strict=True):
                if not torch.tensor(scored.member_log_likelihood).isfinite().all():
                    raise EnsembleFormatError(
                        "a member's log-likelihood is no finite number",
                        where=f"continuation {row + 1}",
                        hint="Its training diverged, or the base is loaded in a precision too low for it.",
                    )
                found[row] = scored
            progress(len(found))
    return [found[i] for i in range(len(found))]


def _score_batch(ensemble: LoraEnsemble, rows: Sequence[tuple[list[int], int]]) -> list[ContinuationScore]:
    """Score rows of (token ids, how many of the last are the continuation)."""
    longest = max(len(ids) for ids, _ in rows) - 1  # nothing follows the last token
    input_ids, mask, targets = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    positions = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, (ids, new) in enumerate(rows):
        length = len(ids) - 1
        input_ids[b, :length], targets[b, :length] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        mask[b, :length] = 1
        positions[b, length - new : length] = True
    input_ids, mask, targets, positions = (x.to(ensemble.device) for x in (input_ids, mask, targets, positions))
    chunks = ensemble.next_token_log_probs(input_ids, mask, positions)
    log_p_MN, is_top1_N = _along(chunks, targets[positions], positions.nonzero()[:, 0], ensemble.weights.log())
    ell_MB = log_p_MN.new_zeros(ensemble.num_members, len(rows)).index_add(1, positions.nonzero()[:, 0], log_p_MN)
    wrong_B = ell_MB.new_zeros(len(rows)).index_add(0, positions.nonzero()[:, 0], (~is_top1_N).double())
    mixture_B = (ensemble.weights.double().log()[:, None] + ell_MB).logsumexp(0)
    columns = zip(mixture_B.tolist(), (wrong_B == 0).tolist(), ell_MB.T.tolist(), strict=True)
    return [ContinuationScore(*values) for values in columns]


def _along(chunks: Iterator[Tensor], targets_N: Tensor, rows_N: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log p_m, float64 [M, N], and whether it is the mixture's likeliest token given its prefix, [N].

    Args:
        chunks: log-probabilities [M, n, V] of N positions, those of one row next to each other.
        targets_N: token that follows each position.
        rows_N: the row that each position belongs to.
        log_weights: log π, [M].
    """
    log_pi_M = log_weights.double().log_softmax(0)
    is_first = [True, *(rows_N.diff() != 0).tolist()]
    log_p_MN = log_pi_M.new_zeros(len(log_pi_M), len(targets_N))
    is_top1_N = torch.zeros_like(targets_N, dtype=torch.bool)
    log_w_M, start = log_pi_M, 0
    for log_p_MnV in chunks:
        at = slice(start, start := start + log_p_MnV.shape[1])
        log_p_MN[:, at] = log_p_MnV.gather(2, targets_N[at].expand(len(log_p_MnV), -1)[..., None])[..., 0].double()
        before = []  # log w_m before each position
        for n in range(at.start, at.stop):
            log_w_M = log_pi_M if is_first[n] else log_w_M
            before.append(log_w_M)
            log_w_M = running_log_weights(log_w_M, log_p_MN[:, n])
        mixture_nV = (torch.stack(before, dim=1).float()[..., None] + log_p_MnV).logsumexp(0)
        of_target = mixture_nV.gather(1, targets_N[at, None])[:, 0]
        is_top1_N[at] = of_target == mixture_nV.amax(-1)
    return log_p_MN, is_top1_N
