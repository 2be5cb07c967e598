"""How sure the mixture is of each next token, and whether it is right. Calibration is measured on these.

Tokens, labels and the joint forward are the same as in training. Read next: `renyi.evaluation.text_quality`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from renyi.batches import batches_by_length, padded
from renyi.ensemble import LoraEnsemble
from renyi.labels import IGNORED
from renyi.objectives import running_log_weights


class TokenConfidence(NamedTuple):
    """For K trained tokens: the probability of the mixture's likeliest token, float64 [K]; whether it is right, [K]."""

    confidence: Tensor
    is_right: Tensor


def token_confidence(
    ensemble: LoraEnsemble,
    dataset: Dataset,
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> TokenConfidence:
    """The mixture's confidence at every trained token of a prepared dataset, shorter rows first.

    The predictive is that of the mixture of sequences, Σ_m w_m(y_<t) p_m(y_t | y_<t). A weight is π times the
    likelihood of the trained tokens before under that member, divided by the sum over members.

    Args:
        ensemble: M members.
        dataset: with columns `input_ids` and `labels`, −100 where not trained, as `prepare` makes them.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single row is scored alone.
        progress: called after each batch with the number of examples done.
    """
    columns = dataset.select_columns(["input_ids", "labels"])
    lengths = [len(ids) for batch in columns.iter(1000) for ids in batch["input_ids"]]
    found: list[tuple[Tensor, Tensor]] = []
    done = 0
    with ensemble.inference(), torch.inference_mode():
        for rows in batches_by_length(lengths, tokens_per_batch // ensemble.num_members):
            found += _of_batch(ensemble, columns[rows])
            progress(done := done + len(rows))
    return TokenConfidence(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def _of_batch(ensemble: LoraEnsemble, columns: dict[str, list[list[int]]]) -> list[tuple[Tensor, Tensor]]:
    """Confidence of all trained tokens of some rows, and whether each was right, in chunks, row by row."""
    rows = padded(columns["input_ids"], 0), padded([[1] * len(x) for x in columns["labels"]], 0)
    input_ids, attention_mask, labels = (x.to(ensemble.device) for x in (*rows, padded(columns["labels"], IGNORED)))
    next_BT = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
    is_trained_BT = next_BT != IGNORED
    ell_MBT = ensemble.token_log_likelihood(input_ids, attention_mask, labels).double()  # 0 where not trained
    after = []  # log w_m for the token after token t
    log_w_MB = ensemble.weights.double().log()[:, None].expand(ell_MBT.shape[:2])
    for ell_MB in ell_MBT.unbind(dim=-1):
        after.append(log_w_MB := running_log_weights(log_w_MB, ell_MB))
    log_w_MK, target_K = torch.stack(after, dim=-1)[:, is_trained_BT], next_BT[is_trained_BT]

    found, start = [], 0
    for log_p_MnV in ensemble.next_token_log_probs(input_ids, attention_mask, is_trained_BT):
        at = slice(start, start := start + log_p_MnV.shape[1])
        likeliest_n = (log_w_MK[:, at, None].float() + log_p_MnV).logsumexp(dim=0).max(dim=-1)
        found.append((likeliest_n.values.double().exp(), likeliest_n.indices == target_K[at]))
    return found
