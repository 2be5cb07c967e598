"""How likely each option of a multiple-choice question is to every member: by its letter, or by its text.

Prompts, tokens and one joint forward; likelihoods are `score`'s. It knows neither which option is right nor files.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi.data import IGNORED, LETTERS, Question
from renyi.ensemble import LoraEnsemble
from renyi.errors import DataError
from renyi.inference.score import score

ChoiceBy = Literal["letter", "text", "text_normalised"]


class ChoiceScores(NamedTuple):
    """What an ensemble of M members says about the options of N questions, of which one has C options at most.

    Attributes:
        log_likelihood: log p_m(option | prompt), float64 [M, N, C], nats; −inf where a question has fewer options.
        tokens: of each option, [N, C]; 0 where there is none.
        cut: questions whose prompt was longer than the model's context, so that its beginning was dropped.
    """

    log_likelihood: Tensor
    tokens: Tensor
    cut: int


def score_choices(
    ensemble: LoraEnsemble,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    by: ChoiceBy = "letter",
    *,
    max_length: int | None = None,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> ChoiceScores:
    """Score every option of every question under every member; the right answers are not looked at.

    By letter, the prompt lists the options and ends in "Answer:", and " A", " B", … are scored. By text, the prompt is
    the question alone, and the options' texts are scored; whether their lengths are divided out ("text_normalised")
    is for `choice_log_probs` to do. All options of a question are scored after the same tokens.

    Args:
        ensemble: M members.
        questions: N ≥ 1 of them, with at most 26 options by letter.
        tokenizer: of the base.
        by: what is scored.
        max_length: tokens of a prompt with its option, beyond which the prompt's beginning is dropped; by default the
            model's context.
        tokens_per_batch: limit on members × rows × length in one forward.
        progress: called after each batch with the number of questions done.

    Raises:
        DataError: an option is no token, or alone longer than the context.
        EnsembleFormatError: a member gives no finite likelihood.
    """
    limit = max_length or getattr(ensemble.config, "max_position_embeddings", None)
    tokenised = [_tokenised(q, tokenizer, by, limit, number) for number, q in enumerate(questions, start=1)]
    rows = [row for question in tokenised for row in question.rows]
    dataset = Dataset.from_dict({"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]})
    share = len(questions) / len(rows)
    scored = score(
        ensemble, dataset, tokens_per_batch=tokens_per_batch, progress=lambda done: progress(int(done * share))
    )
    widest = max(len(q.choices) for q in questions)
    ell_MNC = torch.full((ensemble.num_members, len(questions), widest), -torch.inf, dtype=torch.float64)
    tokens_NC = torch.zeros(len(questions), widest, dtype=torch.long)
    where = [(n, c) for n, q in enumerate(questions) for c in range(len(q.choices))]
    for (n, c), one in zip(where, scored, strict=True):
        ell_MNC[:, n, c] = torch.tensor(one.log_likelihood, dtype=torch.float64)
        tokens_NC[n, c] = one.tokens
    return ChoiceScores(ell_MNC, tokens_NC, sum(q.is_cut for q in tokenised))


def choice_log_probs(scores: ChoiceScores, by: ChoiceBy = "letter") -> Tensor:
    """Each member's log-probabilities of the options, [M, N, C]: their likelihoods divided by their sum.

    With "text_normalised" it is likelihoods a token that are divided by their sum.
    """
    ell_MNC = scores.log_likelihood
    return (ell_MNC / scores.tokens.clamp(min=1) if by == "text_normalised" else ell_MNC).log_softmax(dim=-1)


def choice_prompt(question: Question, by: ChoiceBy) -> str:
    """What comes before an option; by letter in the form of Hendrycks et al. 2021 (arXiv 2009.03300)."""
    if by != "letter":
        return f"{question.question.strip()}\nAnswer:"
    options = [f"{letter}. {text.strip()}" for letter, text in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.question.strip(), *options, "Answer:"])


class _Row(NamedTuple):
    input_ids: list[int]
    labels: list[int]


class _Tokenised(NamedTuple):
    rows: list[_Row]
    is_cut: bool


def _tokenised(
    question: Question, tokenizer: PreTrainedTokenizerBase, by: ChoiceBy, limit: int | None, number: int
) -> _Tokenised:
    """A row for each option. They share a prefix: the prompt, but for what a tokenizer merges at its end."""
    prompt = choice_prompt(question, by)
    texts = LETTERS[: len(question.choices)] if by == "letter" else [c.strip() for c in question.choices]
    ids: list[list[int]] = tokenizer([prompt, *(f"{prompt} {text}" for text in texts)])["input_ids"]
    shared = min(_common(ids[0], option) for option in ids[1:])
    longest = max(len(option) for option in ids[1:]) - shared
    if any(len(option) == shared for option in ids[1:]):
        raise DataError("an option holds no token", where=f"row {number}", hint="Remove the question.")
    dropped = max(0, shared + longest - limit) if limit else 0
    if dropped >= shared:
        raise DataError(
            f"an option has {longest} tokens, and the model's context is {limit}",
            where=f"row {number}",
            hint="Remove the question, or score by letter.",
        )
    return _Tokenised(
        [_Row(o[dropped:], [IGNORED] * (shared - dropped) + o[shared:]) for o in ids[1:]], is_cut=dropped > 0
    )


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
