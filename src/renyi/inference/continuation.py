"""How likely continuations are under the mixture, and whether it would choose them greedily.

Token ids in, nats out. Read next: `lm_eval.py`, which uses it for lm-evaluation-harness.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from renyi.batches import batches_by_length, padded
from renyi.ensemble import LoraEnsemble
from renyi.errors import DataError
from renyi.inference.scoring import check_finite
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
    # Continuations that differ in their last token only, such as the letters of a multiple choice, are one row.
    rows: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        rows[(*context, *continuation[:-1]), len(continuation)].append(number)
    read = [_Row(list(ids), length, [continuations[n][-1] for n in numbers]) for (ids, length), numbers in rows.items()]
    of_rows = list(rows.values())
    found: dict[int, ContinuationScore] = {}
    with ensemble.inference(), torch.inference_mode():
        lengths = [len(row.ids) for row in read]
        for batch in batches_by_length(lengths, tokens_per_batch // ensemble.num_members):
            for at, scores in zip(batch, _score_batch(ensemble, [read[row] for row in batch]), strict=True):
                for number, scored in zip(of_rows[at], scores, strict=True):
                    check_finite(torch.tensor(scored.member_log_likelihood)[:, None], [number], where="continuation")
                    found[number] = scored
            progress(len(found))
    return [found[i] for i in range(len(found))]


class _Row(NamedTuple):
    """Continuations of one context that have all tokens but the last in common.

    Attributes:
        ids: of the context and of what they have in common.
        length: of each continuation, tokens.
        lasts: the last token of each.
    """

    ids: list[int]
    length: int
    lasts: list[int]


def _score_batch(ensemble: LoraEnsemble, rows: Sequence[_Row]) -> list[list[ContinuationScore]]:
    input_ids, mask = padded([row.ids for row in rows], 0), padded([[1] * len(row.ids) for row in rows], 0)
    positions = padded([[0] * (len(row.ids) - row.length) + [1] * row.length for row in rows], 0).bool()
    # What follows a last position differs between the continuations of a row. Its first one stands for all here.
    targets = padded([[*row.ids[1:], row.lasts[0]] for row in rows], 0)
    input_ids, mask, targets, positions = (x.to(ensemble.device) for x in (input_ids, mask, targets, positions))
    row_N = positions.nonzero()[:, 0]
    ends = positions.sum(1).cumsum(0) - 1
    lasts = {n: torch.tensor(row.lasts, device=ensemble.device) for n, row in zip(ends.tolist(), rows, strict=True)}
    chunks = ensemble.next_token_log_probs(input_ids, mask, positions)
    log_p_MN, is_top1_N, last = _along(chunks, targets[positions], row_N, ensemble.weights.log(), lasts)
    before_MN, wrong_N = log_p_MN.index_fill(1, ends, 0.0), (~is_top1_N).double().index_fill(0, ends, 0.0)
    ell_MB = log_p_MN.new_zeros(ensemble.num_members, len(rows)).index_add(1, row_N, before_MN)
    wrong_B = ell_MB.new_zeros(len(rows)).index_add(0, row_N, wrong_N)
    found = []
    for b, (log_p_MK, is_top1_K) in enumerate(last):
        ell_MK = ell_MB[:, b, None] + log_p_MK
        mixture_K = (ensemble.weights.double().log()[:, None] + ell_MK).logsumexp(0)
        greedy_K = is_top1_K & (wrong_B[b] == 0)
        columns = zip(mixture_K.tolist(), greedy_K.tolist(), ell_MK.T.tolist(), strict=True)
        found.append([ContinuationScore(*values) for values in columns])
    return found


def _along(
    chunks: Iterator[Tensor], targets_N: Tensor, rows_N: Tensor, log_weights: Tensor, lasts: dict[int, Tensor]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Each target's log p_m, float64 [M, N], and whether it is the mixture's likeliest token given its prefix, [N].

    Args:
        chunks: log-probabilities [M, n, V] of N positions, those of one row next to each other.
        targets_N: token that follows each position.
        rows_N: the row that each position belongs to.
        log_weights: log π, [M].
        lasts: by position, in order, several tokens [K] that may follow it; the same of these is the third result,
            [M, K] and [K] for each position.
    """
    log_pi_M = log_weights.double().log_softmax(0)
    is_first = [True, *(rows_N.diff() != 0).tolist()]
    log_p_MN = log_pi_M.new_zeros(len(log_pi_M), len(targets_N))
    is_top1_N = torch.zeros_like(targets_N, dtype=torch.bool)
    of_lasts = []
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
        most_n = mixture_nV.amax(-1)
        is_top1_N[at] = mixture_nV.gather(1, targets_N[at, None])[:, 0] == most_n
        for n in range(at.start, at.stop):
            if n in lasts:
                here = n - at.start
                of_lasts.append((log_p_MnV[:, here, lasts[n]].double(), mixture_nV[here, lasts[n]] == most_n[here]))
    return log_p_MN, is_top1_N, of_lasts
