"""How likely each option of a multiple-choice question is to every member: by its letter, or by its text.

Read next: `score.py`, which scores rows in the same way.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from renyi.batches import batches_by_length, padded
from renyi.data import LETTERS, Question
from renyi.ensemble import LoraEnsemble
from renyi.errors import DataError
from renyi.inference.score import score
from renyi.inference.scoring import check_finite
from renyi.labels import IGNORED

ChoiceBy = Literal["letter", "text", "text_normalised"]


class ChoiceScores(NamedTuple):
    """What an ensemble of M members says about the options of N questions, of which one has C options at most.

    Attributes:
        log_likelihood: log p_m(option | prompt), float64 [M, N, C], nats; −inf where a question has fewer options.
        tokens: of each option, [N, C]; 0 where there is none.
        cut: how many questions had a prompt that was longer than the model's context. Its beginning was dropped.
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
    """Score every option of every question under every member. The right answers are not used.

    By letter, the prompt lists the options and ends in "Answer:", and " A", " B", … are scored. By text, the prompt is
    the question alone, and the options' texts are scored. `choice_log_probs` divides by their lengths, for
    "text_normalised". All options of a question are scored after the same tokens.

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
        DataError: an option has no token, or is longer than the context by itself.
        EnsembleFormatError: a member gives no finite likelihood.
    """
    limit = max_length or getattr(ensemble.config, "max_position_embeddings", None)
    tokenised = [_tokenised(q, tokenizer, by, limit, number) for number, q in enumerate(questions, start=1)]
    if all(question.is_one_token for question in tokenised):  # so are letters: one row for each question is enough
        with ensemble.inference():
            return _score_next_tokens(ensemble, tokenised, tokens_per_batch, progress)
    if _keeps_prompts(ensemble):
        with ensemble.inference():
            return _score_after_prompts(ensemble, tokenised, tokens_per_batch, progress)
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


@torch.inference_mode()
def _score_next_tokens(
    ensemble: LoraEnsemble,
    questions: "Sequence[_Tokenised]",
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> ChoiceScores:
    """`score_choices` where an option is the one token after its question's prompt."""
    prompts = [q.rows[0].input_ids[:-1] for q in questions]
    options = padded([[row.input_ids[-1] for row in q.rows] for q in questions], -1)
    ell_MNC = torch.full((ensemble.num_members, *options.shape), -torch.inf, dtype=torch.float64)
    done = 0
    for rows in batches_by_length([len(ids) for ids in prompts], tokens_per_batch // ensemble.num_members):
        input_ids = padded([prompts[i] for i in rows], 0)
        lengths = torch.tensor([len(prompts[i]) for i in rows])[:, None]
        position = torch.arange(input_ids.shape[1])
        inputs = (input_ids, (position < lengths).long(), position == lengths - 1)
        there = options[rows] >= 0
        picked = options[rows].clamp(min=0).to(ensemble.device).expand(ensemble.num_members, -1, -1)
        of_chunks, start = [], 0
        for log_p_MnV in ensemble.next_token_log_probs(*(x.to(ensemble.device) for x in inputs)):
            # Only the options' columns are kept of each chunk, never the whole vocabulary of all rows.
            of_chunk = picked[:, start : (start := start + log_p_MnV.shape[1])]
            of_chunks.append(log_p_MnV.gather(-1, of_chunk).double().cpu())
        log_p_MBC = torch.cat(of_chunks, dim=1)
        check_finite(log_p_MBC.masked_fill(~there, 0.0).sum(-1), rows)
        ell_MNC[:, rows] = log_p_MBC.masked_fill(~there, -torch.inf)
        progress(done := done + len(rows))
    return ChoiceScores(ell_MNC, (options >= 0).long(), sum(q.is_cut for q in questions))


def _keeps_prompts(ensemble: LoraEnsemble) -> bool:
    """Whether a prompt can be read once for all options: the base keeps nothing of a text but keys and values."""
    layers = DynamicCache(config=ensemble.base.config.get_text_config()).layers
    stateful = getattr(ensemble.base, "_is_stateful", False)
    return not stateful and bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


@torch.inference_mode()
def _score_after_prompts(
    ensemble: LoraEnsemble,
    questions: "Sequence[_Tokenised]",
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> ChoiceScores:
    """`score_choices` where options have several tokens. What a question's options share is read once for all of them.

    Questions with equally long prompts and equally many options go together, so that no prompt is padded.
    """
    widest, done = max(len(q.rows) for q in questions), 0
    ell_MNC = torch.full((ensemble.num_members, len(questions), widest), -torch.inf, dtype=torch.float64)
    tokens_NC = torch.zeros(len(questions), widest, dtype=torch.long)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        alike[question.shared, len(question.rows)].append(number)
    for (shared, options), numbers in sorted(alike.items()):
        longest = max(len(row.input_ids) for n in numbers for row in questions[n].rows) - shared
        size = max(1, tokens_per_batch // (ensemble.num_members * max(shared, options * longest)))
        for batch in (numbers[start : start + size] for start in range(0, len(numbers), size)):
            texts = [row.input_ids[shared:] for n in batch for row in questions[n].rows]
            prompts = torch.tensor([questions[n].rows[0].input_ids[:shared] for n in batch])
            ell_MB = _options_after(ensemble, prompts, padded(texts, IGNORED), options).cpu()
            ell_MBC = ell_MB.unflatten(1, (-1, options))
            check_finite(ell_MBC.sum(-1), batch)
            ell_MNC[:, batch, :options] = ell_MBC
            tokens_NC[batch, :options] = torch.tensor([len(text) for text in texts]).view(-1, options)
            progress(done := done + len(batch))
    return ChoiceScores(ell_MNC, tokens_NC, sum(q.is_cut for q in questions))


def _options_after(ensemble: LoraEnsemble, prompts_BL: Tensor, texts_RT: Tensor, options: int) -> Tensor:
    """log p_m(option | prompt), float64 [M, B·C], nats, of C options for each of B prompts; −100 pads options."""
    cache = DynamicCache(config=ensemble.base.config.get_text_config())
    cached = {ensemble.cache_name: cache, "use_cache": True}
    texts_RT = texts_RT.to(ensemble.device)
    hidden_MBLD = ensemble.hidden_states(prompts_BL.to(ensemble.device), None, cached)
    hidden_MRTD = hidden_MBLD[:, :, -1:].repeat_interleave(options, dim=1)  # it predicts an option's first token
    if texts_RT.shape[1] > 1:
        cache.batch_repeat_interleave(options)
        read_RT = texts_RT[:, :-1].clamp(min=0)
        hidden_MRTD = torch.cat([hidden_MRTD, ensemble.hidden_states(read_RT, None, cached)], dim=2)
    return ensemble.score_states(hidden_MRTD, texts_RT).log_probs.double().sum(dim=-1)


def choice_log_probs(scores: ChoiceScores, by: ChoiceBy = "letter") -> Tensor:
    """Each member's log-probabilities of the options, [M, N, C]: their likelihoods divided by their sum.

    With "text_normalised" the likelihoods per token are divided by their sum.
    """
    ell_MNC = scores.log_likelihood
    return (ell_MNC / scores.tokens.clamp(min=1) if by == "text_normalised" else ell_MNC).log_softmax(dim=-1)


def choice_prompt(question: Question, by: ChoiceBy) -> str:
    """The text before an option. By letter it has the form of Hendrycks et al. 2021 (arXiv 2009.03300)."""
    if by != "letter":
        return f"{question.question.strip()}\nAnswer:"
    options = [f"{letter}. {text.strip()}" for letter, text in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.question.strip(), *options, "Answer:"])


class _Row(NamedTuple):
    input_ids: list[int]
    labels: list[int]


class _Tokenised(NamedTuple):
    rows: list[_Row]
    shared: int  # tokens that all rows begin with
    is_cut: bool

    @property
    def is_one_token(self) -> bool:
        """Whether every option is a single token after the same prompt."""
        return all(row.labels.count(IGNORED) == len(row.labels) - 1 for row in self.rows)


def _tokenised(
    question: Question, tokenizer: PreTrainedTokenizerBase, by: ChoiceBy, limit: int | None, number: int
) -> _Tokenised:
    """A row for each option. The rows share the prompt as a prefix, except tokens that merge with the option."""
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
        [_Row(o[dropped:], [IGNORED] * (shared - dropped) + o[shared:]) for o in ids[1:]],
        shared - dropped,
        is_cut=dropped > 0,
    )


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
