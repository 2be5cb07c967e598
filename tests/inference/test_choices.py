"""Truths about scoring options: against the ensemble's own likelihoods, for letters, texts, and cut prompts."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import WORDS, tiny_ensemble, tiny_tokenizer

from renyi.data import Question
from renyi.errors import DataError
from renyi.inference import choice_log_probs, choice_prompt, choices, score_choices

QUESTIONS = [
    Question("w1 w2 w3", ["w4", "w5 w6", "w7 w8 w9"], 0),
    Question("w9", ["w1 w1", "w2"], 1),
    Question("w3 w3", ["w4 w5", "w4 w6", "w7"], 2),
]


def lettered_tokenizer() -> object:
    """Knows letters as tokens, in place of the last words."""
    tokenizer = tiny_tokenizer()
    swap = dict(zip(WORDS[-8:], ["A", "B", "C", "A.", "B.", "C.", "Answer:", "D"], strict=True))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {swap.get(token, token): i for token, i in tokenizer.get_vocab().items()}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("by", ["letter", "text"])
def test_likelihoods_are_the_ensembles(by: str) -> None:
    """Each option alone, without a batch: log p(prompt and option) − log p(prompt)."""
    ensemble, tokenizer = tiny_ensemble(3), lettered_tokenizer()
    found = score_choices(ensemble, QUESTIONS, tokenizer, by, tokens_per_batch=200)
    assert found.log_likelihood.shape == (3, 3, 3)
    for n, question in enumerate(QUESTIONS):
        prompt = choice_prompt(question, by)
        for c, text in enumerate(question.choices):
            whole, start = (
                torch.tensor([tokenizer(t)["input_ids"]])
                for t in (f"{prompt} {text if by == 'text' else 'ABC'[c]}", prompt)
            )
            with torch.no_grad():
                expected = ensemble.log_likelihood(whole) - ensemble.log_likelihood(start)
            torch.testing.assert_close(found.log_likelihood[:, n, c].float(), expected[:, 0], rtol=1e-4, atol=1e-4)
            assert found.tokens[n, c] == whole.shape[1] - start.shape[1]
    assert found.log_likelihood[:, 1, 2].tolist() == [-torch.inf] * 3
    assert (found.tokens[1, 2], found.cut) == (0, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "neox"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_prompts_that_are_read_once_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, budget: int) -> None:
    """Against a row for each option, as models without a cache of keys and values have it."""
    ensemble, tokenizer, done = tiny_ensemble(2, kind), tiny_tokenizer(), list[int]()
    found = score_choices(
        ensemble, [*QUESTIONS, *QUESTIONS[::-1]], tokenizer, "text", tokens_per_batch=budget, progress=done.append
    )
    monkeypatch.setattr(choices, "_keeps_prompts", lambda ensemble: False)
    expected = score_choices(ensemble, [*QUESTIONS, *QUESTIONS[::-1]], tokenizer, "text")
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.cut, done[-1]) == (0, 6)


def test_a_prompt_is_read_once_for_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, seen = tiny_ensemble(2), list[int]()
    forward = ensemble.base.base_model.forward

    def watched(**given: Any) -> Any:
        seen.append(given["input_ids"].numel())
        return forward(**given)

    monkeypatch.setattr(ensemble.base.base_model, "forward", watched)
    score_choices(ensemble, QUESTIONS[:1], tiny_tokenizer(), "text")
    prompt = len(tiny_tokenizer()(choice_prompt(QUESTIONS[0], "text"))["input_ids"])
    assert seen == [2 * prompt, 2 * 3 * 2]  # options of 1, 2 and 3 tokens, padded; nothing follows the last


def test_probabilities_of_options() -> None:
    scores = score_choices(tiny_ensemble(2), QUESTIONS, lettered_tokenizer(), "text")
    plain, normalised = choice_log_probs(scores, "text"), choice_log_probs(scores, "text_normalised")
    for log_probs in (plain, normalised):
        torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(2, 3, dtype=torch.float64))
        assert (log_probs[:, 1, 2] == -torch.inf).all()
    difference = (scores.log_likelihood / scores.tokens.clamp(min=1))[:, 0, 0:2].diff(dim=-1)
    torch.testing.assert_close(normalised[:, 0, 0:2].diff(dim=-1), difference)
    assert not torch.allclose(plain[:, 0], normalised[:, 0])


def test_the_letter_prompt() -> None:
    question = Question("Is it so? ", ["yes", "no"], 0)
    assert choice_prompt(question, "letter") == "Is it so?\nA. yes\nB. no\nAnswer:"
    assert choice_prompt(question, "text") == "Is it so?\nAnswer:"


def test_options_that_begin_alike_are_told_apart_after_the_same_prompt() -> None:
    """What the options share is scored as part of each of them."""
    found = score_choices(tiny_ensemble(1), QUESTIONS[2:], lettered_tokenizer(), "text")
    assert found.tokens.tolist() == [[2, 2, 1]]


def test_a_long_prompt_loses_its_beginning() -> None:
    ensemble, tokenizer = tiny_ensemble(2), lettered_tokenizer()
    long = [Question("w9 " * 20 + "w1 w2 w3", ["w4", "w5 w6"], 0)]
    short = [Question("w1 w2 w3", ["w4", "w5 w6"], 0)]
    limit = 4 + 2  # three words and "Answer:", and the longest option
    cut = score_choices(ensemble, long, tokenizer, "text", max_length=limit)
    assert cut.cut == 1
    expected = score_choices(ensemble, short, tokenizer, "text")
    torch.testing.assert_close(cut.log_likelihood, expected.log_likelihood, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="row 1: an option has 2 tokens, and the model's context is 2"):
        score_choices(ensemble, long, tokenizer, "text", max_length=2)


def test_progress_ends_at_all_questions() -> None:
    told: list[int] = []
    score_choices(tiny_ensemble(1), QUESTIONS, lettered_tokenizer(), "text", tokens_per_batch=16, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == len(QUESTIONS)


def test_letters_in_one_pass_are_letters_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question's letters are read off one row; scored as rows of their own they come out the same."""
    ensemble, tokenizer = tiny_ensemble(3), lettered_tokenizer()
    at_once = score_choices(ensemble, QUESTIONS, tokenizer, "letter", tokens_per_batch=64)
    monkeypatch.setattr(choices._Tokenised, "is_one_token", False)
    one_by_one = score_choices(ensemble, QUESTIONS, tokenizer, "letter")
    torch.testing.assert_close(at_once.log_likelihood, one_by_one.log_likelihood, rtol=1e-5, atol=1e-5)
    assert torch.equal(at_once.tokens, one_by_one.tokens)


def test_of_a_vocabulary_only_the_options_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By letter, a chunk [M, n, V] of log-probabilities is gone before the next one is made."""
    ensemble, tokenizer = tiny_ensemble(3), lettered_tokenizer()
    expected = score_choices(ensemble, QUESTIONS * 3, tokenizer).log_likelihood
    whole, most = ensemble.next_token_log_probs, 0

    def in_chunks_of_one(*inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        nonlocal most
        alive: list[weakref.ref[torch.Tensor]] = []
        for one in torch.cat(list(whole(*inputs)), dim=1).split(1, dim=1):
            made = one.clone()
            most = max(most, sum(chunk() is not None for chunk in alive) + 1)
            alive.append(weakref.ref(made))
            yield made
            del made

    monkeypatch.setattr(ensemble, "next_token_log_probs", in_chunks_of_one)
    assert torch.equal(score_choices(ensemble, QUESTIONS * 3, tokenizer).log_likelihood, expected)
    assert most <= 2  # the one in hand, and the one that comes
