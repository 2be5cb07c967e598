"""Scores of continuations against the ensemble's own logits, token by token, and in any batch."""

from typing import Any

import pytest
import torch
from tiny import tiny_ensemble

from renyi import LoraEnsemble
from renyi.ensemble import head
from renyi.errors import DataError, EnsembleFormatError
from renyi.inference import score_continuations
from renyi.inference.continuation import _along


def by_hand(ensemble: LoraEnsemble, context: list[int], continuation: list[int]) -> tuple[list[float], float, bool]:
    """Bayes' rule a token, in float64."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        log_p_MTV = ensemble.logits(ids)[:, 0].double().log_softmax(-1)
    log_w = ensemble.weights.double().log()
    log_joint, is_greedy = log_w.clone(), True
    for t in range(len(context), ids.shape[1]):
        predictive_V = ((log_joint - log_joint.logsumexp(0))[:, None] + log_p_MTV[:, t - 1]).logsumexp(0)
        is_greedy &= int(predictive_V.argmax()) == int(ids[0, t])
        log_joint = log_joint + log_p_MTV[:, t - 1, ids[0, t]]
    return (log_joint - log_w).tolist(), float(log_joint.logsumexp(0)), is_greedy


def greedy(ensemble: LoraEnsemble, context: list[int], number: int) -> list[int]:
    """The mixture's own greedy continuation, by enumeration of the vocabulary."""
    made: list[int] = []
    for _ in range(number):
        scores = [by_hand(ensemble, context, [*made, v])[1] for v in range(ensemble.config.vocab_size)]
        made.append(int(torch.tensor(scores).argmax()))
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere"])
def test_against_bayes_rule_a_token(kind: str) -> None:
    ensemble = tiny_ensemble(3, kind)
    ensemble.weights.copy_(torch.tensor([0.6, 0.1, 0.3]))
    draw = torch.Generator().manual_seed(5)
    contexts, continuations = [], []
    for x, y in ((1, 1), (4, 6), (7, 2), (1, 9), (3, 1)):
        contexts.append(torch.randint(5, 64, (x,), generator=draw).tolist())
        continuations.append(torch.randint(5, 64, (y,), generator=draw).tolist())
    contexts.append([9, 8, 7])
    continuations.append(greedy(ensemble, [9, 8, 7], 4))
    for tokens_per_batch in (1, 16_384):
        scores = score_continuations(ensemble, contexts, continuations, tokens_per_batch=tokens_per_batch)
        for score, context, continuation in zip(scores, contexts, continuations, strict=True):
            members, mixture, is_greedy = by_hand(ensemble, context, continuation)
            assert score.member_log_likelihood == pytest.approx(members, abs=2e-5)
            assert score.log_likelihood == pytest.approx(mixture, abs=2e-5)
            assert score.is_greedy == is_greedy
        assert [score.is_greedy for score in scores][-1]
        assert not any(score.is_greedy for score in scores[:-1])


def test_logits_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is split between chunks keeps its running weights."""
    ensemble = tiny_ensemble(3)
    contexts, continuations = [[9, 8, 7], [5, 6]], [greedy(ensemble, [9, 8, 7], 5), [40, 41, 42, 43]]
    whole = score_continuations(ensemble, contexts, continuations)
    for positions in (1, 2, 4):
        monkeypatch.setattr("renyi.ensemble.joint.LOGITS_PER_CHUNK", positions * 3 * 64)
        for one, other in zip(score_continuations(ensemble, contexts, continuations), whole, strict=True):
            assert one.is_greedy == other.is_greedy
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
    assert [score.is_greedy for score in whole] == [True, False]
    assert head.LOGITS_PER_CHUNK > 1000  # the whole was one chunk


def test_running_weights_decide_what_is_likeliest() -> None:
    """A member that explains the first token decides the second, though the prior weights favour the other."""

    def position(first: float, second: float) -> torch.Tensor:
        """Two members over the tokens 0 and 1."""
        return torch.tensor([[[first, 1 - first]], [[second, 1 - second]]]).log()

    log_weights = torch.tensor([0.55, 0.45]).log()
    for targets, expected in (([0, 1], [False, True]), ([1, 0], [True, True]), ([1, 1], [True, False])):
        chunks = iter([position(0.01, 0.99), position(0.9, 0.1)])  # 0.549 for token 1; 0.54 for 0 by prior weights
        found = _along(chunks, torch.tensor(targets), torch.tensor([0, 0]), log_weights, {1: torch.tensor([0, 1])})
        assert found[1].tolist() == expected
        ((log_p_MK, is_top1_K),) = found[2]
        torch.testing.assert_close(log_p_MK[:, targets[1]], found[0][:, 1])
        assert is_top1_K[targets[1]] == expected[1]


def test_continuations_that_differ_in_their_last_token_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the letters of a multiple choice cost what one of them does. The scores are those of single requests."""
    ensemble, seen, done = tiny_ensemble(3), list[int](), list[int]()
    contexts = [[9, 8, 7], [5, 6], [9, 8, 7], [9, 8, 7], [9, 8, 7], [9, 8, 7, 40]]
    continuations = [[40], [41, 42], [41], [40, 12], [40, 13], [13]]
    alone = [score_continuations(ensemble, [x], [y])[0] for x, y in zip(contexts, continuations, strict=True)]
    forward = ensemble.base.base_model.forward

    def watched(**given: Any) -> Any:
        seen.append(len(given["input_ids"]))
        return forward(**given)

    monkeypatch.setattr(ensemble.base.base_model, "forward", watched)
    found = score_continuations(ensemble, contexts, continuations, progress=done.append)
    assert (seen, done) == ([3 * 4], [6])
    for one, other in zip(found, alone, strict=True):
        assert one.is_greedy == other.is_greedy
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
        assert one.member_log_likelihood == pytest.approx(other.member_log_likelihood, abs=1e-5)


def test_what_cannot_be_scored() -> None:
    ensemble = tiny_ensemble(2)
    with pytest.raises(DataError, match="context 2"):
        score_continuations(ensemble, [[5], []], [[6], [7]])
    with pytest.raises(DataError, match="continuation 1"):
        score_continuations(ensemble, [[5]], [[]])
    with torch.no_grad():
        next(p for n, p in ensemble.named_parameters() if "down_proj" in n and n.endswith("lora_B"))[1] = torch.nan
    with pytest.raises(EnsembleFormatError, match="continuation 1"):
        score_continuations(ensemble, [[5]], [[6]])
