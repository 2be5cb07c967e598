"""The mixture's confidence at every trained token, against the definition on full distributions."""

import pytest
import torch
from datasets import Dataset
from tiny import VOCABULARY, tiny_ensemble

from renyi.inference import score
from renyi.inference.confidence import token_confidence

LENGTHS, UNTRAINED = (4, 6, 9), 2


def rows() -> Dataset:
    """Rows that begin with untrained tokens, the shortest first, as they are scored."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * UNTRAINED + x[UNTRAINED:] for x in ids]})


@pytest.mark.parametrize("tokens_per_batch", [1, 10_000])
def test_it_is_the_mixture_of_sequences_token_by_token(tokens_per_batch: int) -> None:
    ensemble = tiny_ensemble(3)
    ensemble.weights = torch.tensor([0.5, 0.3, 0.2])
    found = token_confidence(ensemble, rows(), tokens_per_batch=tokens_per_batch)
    confidence, is_right, log_mixture = [], [], []
    for ids in rows()["input_ids"]:
        with torch.no_grad():
            log_p_MTV = ensemble.logits(torch.tensor([ids]))[:, 0].double().log_softmax(-1)
        log_w_M = ensemble.weights.double().log()
        log_mixture.append(0.0)
        for t in range(UNTRAINED, len(ids)):
            p_V = ((log_w_M - log_w_M.logsumexp(0))[:, None] + log_p_MTV[:, t - 1]).logsumexp(0).exp()
            confidence.append(p_V.max().item())
            is_right.append(p_V.argmax().item() == ids[t])
            log_mixture[-1] += p_V[ids[t]].log().item()
            log_w_M = log_w_M + log_p_MTV[:, t - 1, ids[t]]
    # That the steps multiply to the mixture of sequences shows that the definition above is the right one.
    assert log_mixture == pytest.approx([-s.mixture_nll for s in score(ensemble, rows())], rel=1e-5)
    assert found.confidence.tolist() == pytest.approx(confidence, rel=1e-5)
    assert found.is_right.tolist() == is_right


def test_long_rows_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = tiny_ensemble(2)
    whole = token_confidence(ensemble, rows())
    monkeypatch.setattr("renyi.ensemble.joint.LOGITS_PER_CHUNK", 3 * 2 * VOCABULARY)
    chunked = token_confidence(ensemble, rows())
    torch.testing.assert_close(chunked.confidence, whole.confidence)
    assert chunked.is_right.equal(whole.is_right)


def test_it_leaves_the_ensemble_in_its_mode_and_tells_how_far_it_is() -> None:
    ensemble, done = tiny_ensemble(2).train(), []
    token_confidence(ensemble, rows(), tokens_per_batch=1, progress=done.append)
    assert ensemble.training
    assert done == [1, 2, 3]
