"""From prompts to answers: text in, text out, and how sure the ensemble is of every token.

Users call `renyi.load(folder).generate`, which makes plain text the first message of a chat. Read next:
`renyi.ensemble.decode`, how members are mixed.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi import data
from renyi.data import Limits, prompt_tokens, read_messages
from renyi.ensemble import Generation, LoraEnsemble
from renyi.errors import ConfigError, DataError
from renyi.inference.pieces import Pieces

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]  # plain text, or the messages of a chat
# A prompt, or a dictionary with a `prompt` and with `tools` or `chat_template_kwargs` for the chat template.
PromptRow: TypeAlias = Prompt | Mapping[str, Any]
OnPiece: TypeAlias = Callable[[str, float], object]
MAX_NEW_TOKENS = 256

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """An answer of N tokens, mixed from K members: M, or 1 where a member spoke alone.

    Attributes:
        text: without special tokens.
        token_ids: the end-of-text token, if there is one, included.
        tokens: the piece of `text` that each token added, "" for special tokens and for those that end within a
            character. They join to `text`.
        log_prob: [N], of each token under the mixture, nats.
        weights: [N][K], running weights of the members that each token was predicted with.
        total: [N], entropy of the mixture, nats.
        aleatoric: [N], the part of `total` that each member has by itself (mean entropy), nats.
        epistemic: [N], the part of `total` that is the members' disagreement, nats.
        member_log_likelihood: [K], log p_m(answer | prompt), nats.
        mixture_nll: −log of the answer's probability under the mixture, nats.
        mean_epistemic: mean over the tokens, nats.
        max_epistemic: the greatest of one token, nats.
        disagreement: mean over tokens of the weight of members whose likeliest token was not that of most.
        effective_members: how many members explain the answer, 1 to K.
        within_members: [N], the part of `epistemic` that lies within members that are distributions, nats; None unless
            the K members are draws of such members. The total is aleatoric + within + between.
        between_members: [N], the part of `epistemic` that lies between members; None likewise.
        mean_within_members, mean_between_members: means over the tokens, nats; None likewise.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    log_prob: list[float]
    weights: list[list[float]]
    total: list[float]
    aleatoric: list[float]
    epistemic: list[float]
    member_log_likelihood: list[float]
    mixture_nll: float
    mean_epistemic: float
    max_epistemic: float
    disagreement: float
    effective_members: float
    within_members: list[float] | None = None
    between_members: list[float] | None = None
    mean_within_members: float | None = None
    mean_between_members: float | None = None


def generate(
    ensemble: LoraEnsemble,
    prompts: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    seed: int | None = None,
    on_piece: OnPiece | None = None,
    progress: Callable[[int], object] = lambda done: None,
    **settings: Any,
) -> list[Any]:
    """Answer prompts.

    Args:
        ensemble: M members.
        prompts: plain text, which is continued as it is; or messages with `role` and `content`, after which the
            tokenizer's chat template begins an answer.
        tokenizer: of the base.
        max_new_tokens: the most tokens of an answer. An answer also ends at the last position that the base can read;
            a warning says so.
        batch_size: prompts decoded together; their order is kept.
        seed: of the sampling, plus one for each further batch; None is torch's global generator.
        on_piece: called with the piece of text that a token added and the token's epistemic uncertainty in nats, as
            tokens come; for one prompt.
        progress: called after each batch with the number of prompts done.
        settings: of `LoraEnsemble.generate`: mixture, member, do_sample, temperature, top_p, …. A temperature, top_k,
            top_p or min_p means sampling. By default an answer ends at the tokens of `end_tokens`.

    Returns:
        An `Answer` for each prompt; with mixture="member" and no `member` a list of M answers, one a member.

    Raises:
        DataError: a prompt has no token or more than the base can read, ends with an answer, or does not fit the chat
            template.
        ConfigError: as `LoraEnsemble.generate`, or `batch_size` is below 1.
        EnsembleFormatError: a member's logits are no numbers.
    """
    ensemble.check_writes()
    if batch_size < 1:
        raise ConfigError(f"is {batch_size}", where="batch_size", hint="Give an integer above 0.")
    by_member = settings.get("mixture") == "member" and settings.get("member") is None
    if on_piece is not None and (len(prompts) != 1 or by_member):
        raise ConfigError(
            "follows one answer", where="on_piece", hint="Give one prompt, and where members answer alone, one member."
        )
    rows = [prompt_ids(prompt, tokenizer, number) for number, prompt in enumerate(prompts, start=1)]
    positions = Limits.of(ensemble.base).positions
    _check_lengths(rows, positions)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = end_tokens(ensemble, tokenizer)
    settings = {"tokenizer": tokenizer, "pad_token_id": pad, **({"eos_token_id": ends} if ends else {}), **settings}
    spoken = None if on_piece is None else _Spoken(tokenizer, on_piece)
    if spoken is not None:
        settings["on_token"] = spoken
    answers: list[Any] = []
    longest = math.inf if positions is None else positions - max_new_tokens
    for number, batch in enumerate(_batches([len(ids) for ids in rows], batch_size, longest)):
        input_ids, attention_mask = _left_padded([rows[i] for i in batch], pad)
        room = max_new_tokens if positions is None else positions - input_ids.shape[1]
        generation = ensemble.generate(
            input_ids,
            attention_mask,
            seed=None if seed is None else seed + number,
            max_new_tokens=min(max_new_tokens, room),
            **settings,
        )
        pieces = spoken.pieces() if spoken else None
        answers += _answers(generation, tokenizer, pieces, has_draws=ensemble.num_draws > 1)
        progress(len(answers))
    _warn_of_cut(rows, answers, positions, ends)
    return answers


class _Spoken:
    """Passes on the pieces of one answer as its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_piece: OnPiece):
        self.decoder, self.on_piece = Pieces(tokenizer), on_piece
        self.found: list[str] = []
        self.epistemic = 0.0

    def __call__(self, token_B: Tensor, uncertainty: Any) -> None:
        self.epistemic = float(uncertainty.epistemic)
        self.found.append(self.decoder.add(int(token_B)))
        self.on_piece(self.found[-1], self.epistemic)

    def pieces(self) -> list[str]:
        """All of them, when the answer has ended."""
        left = self.decoder.finish()
        if left:
            self.on_piece(left, self.epistemic)
            self.found[-1] += left
        return self.found


def as_chat(
    prompt: PromptRow, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, plain: bool = False
) -> PromptRow:
    """A prompt in its default form: text becomes a user's message if the tokenizer has a chat template.

    Args:
        prompt: text, or messages.
        tokenizer: of the base.
        system: the system message to begin the chat with.
        plain: whether text is to be continued as it is.

    Raises:
        ConfigError: `system` has no place, or `plain` meets messages.
    """
    if isinstance(prompt, Mapping):
        if "prompt" not in prompt:
            return prompt  # a message that is not in a list; `prompt_ids` refuses it
        return {**prompt, "prompt": as_chat(prompt["prompt"], tokenizer, system=system, plain=plain)}
    if plain or not tokenizer.chat_template:
        if system:
            raise ConfigError("needs a chat template", where="system", hint="Leave system out.")
        if plain and not isinstance(prompt, str):
            raise ConfigError("a prompt is a chat", where="plain", hint="Leave plain out, or give text.")
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and any(isinstance(message, Mapping) and message.get("role") == "system" for message in chat):
        raise ConfigError("a prompt has a system message of its own", where="system", hint="Leave one of the two out.")
    return [{"role": "system", "content": system}, *chat] if system else chat


def prompt_ids(prompt: PromptRow, tokenizer: PreTrainedTokenizerBase, number: int = 1) -> list[int]:
    """The tokens of a prompt. Errors call it prompt `number`.

    Raises:
        DataError: there are none, or the messages do not fit the chat template.
    """
    where = f"prompt {number}"
    row: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) and "prompt" in prompt else {"prompt": prompt}
    asked = row["prompt"]
    if isinstance(asked, str):
        return prompt_tokens(asked, tokenizer, where)
    if not isinstance(asked, Sequence):
        raise DataError("is one message", where=where, hint="A prompt is text, or a list of messages: [[{…}, {…}]].")
    if not tokenizer.chat_template:
        raise DataError(
            "is a chat, and the tokenizer has no chat template", where=where, hint="Give plain text, or a template."
        )
    chat = read_messages([dict(message) for message in asked], where)
    if chat[-1]["role"] == "assistant":
        raise DataError(
            "ends with the assistant's turn", where=where, hint="End it with the user's: the answer comes next."
        )
    return prompt_tokens(chat, tokenizer, where, row)


def end_tokens(ensemble: LoraEnsemble, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the base's, the tokenizer's, and what the chat template closes a turn with.

    After fine-tuning on chats a model writes the token that closes a turn, even if the base ended texts with another.
    """
    of_base = ensemble.generation_config.eos_token_id
    found = [of_base] if isinstance(of_base, int) else list(of_base or [])
    return list(dict.fromkeys([*found, *data.end_tokens(tokenizer)]))


def _batches(lengths: Sequence[int], size: int, longest: float) -> Iterator[list[int]]:
    """Batches of indices of prompts, in order. A prompt whose answer may reach the base's last position is alone,
    because the whole batch ends there.
    """
    batch: list[int] = []
    for index, length in enumerate(lengths):
        if batch and (len(batch) == size or max(length, lengths[batch[-1]]) > longest):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _check_lengths(rows: Sequence[Sequence[int]], positions: int | None) -> None:
    """Raise `DataError` for the first prompt that leaves no position for an answer."""
    for number, ids in enumerate(rows, start=1):
        if positions is not None and len(ids) >= positions:
            raise DataError(
                f"has {len(ids):,} tokens, and the base reads {positions:,} with the answer",
                where=f"prompt {number}",
                hint="Shorten it: a prompt is never cut, because its end is what is answered.",
            )


def _warn_of_cut(
    rows: Sequence[Sequence[int]], answers: Sequence[Any], positions: int | None, ends: Sequence[int]
) -> None:
    """Warn how many answers ended at the base's last position."""
    cut = sum(
        len(ids) + len(one.token_ids) >= (positions or len(ids) + len(one.token_ids) + 1)
        and one.token_ids[-1] not in ends
        for ids, answer in zip(rows, answers, strict=True)
        for one in (answer if isinstance(answer, list) else [answer])
    )
    if cut:
        logger.warning("%d answer%s cut at the %d positions of the base", cut, "s" if cut > 1 else "", positions)


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    input_ids = torch.tensor([[pad] * empty + row for empty, row in zip(padding, rows, strict=True)])
    return input_ids, torch.tensor([[0] * n + [1] * (longest - n) for n in padding])


def _answers(
    generation: Generation, tokenizer: PreTrainedTokenizerBase, pieces: list[str] | None, has_draws: bool
) -> list[Any]:
    """An `Answer` for each row, or a list of them if every member has its own rows. `pieces` are of a single answer."""
    on_cpu = Generation(*(value.cpu() for value in generation))
    if on_cpu.mask.dim() == 2:
        return [_answer(on_cpu, (row,), tokenizer, pieces, has_draws) for row in range(len(on_cpu.mask))]
    members, batch, _ = on_cpu.mask.shape
    return [[_answer(on_cpu, (m, row), tokenizer) for m in range(members)] for row in range(batch)]


def _answer(
    generation: Generation,
    at: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
    pieces: list[str] | None = None,
    has_draws: bool = False,
) -> Answer:
    tokens = int(generation.mask[at].sum())
    ids = generation.new_tokens[at][:tokens].tolist()
    every: tuple[Any, ...] = (slice(None), *at)
    if pieces is None:
        decoder = Pieces(tokenizer)
        pieces = [decoder.add(token) for token in ids]
        pieces[-1] += decoder.finish()
    answer = Answer(
        text="".join(pieces),
        token_ids=ids,
        tokens=pieces,
        log_prob=generation.log_prob[at][:tokens].tolist(),
        weights=generation.weights[every][:, :tokens].T.tolist(),
        total=generation.total[at][:tokens].tolist(),
        aleatoric=generation.aleatoric[at][:tokens].tolist(),
        epistemic=generation.epistemic[at][:tokens].tolist(),
        member_log_likelihood=generation.member_log_likelihood[every].tolist(),
        mixture_nll=float(generation.mixture_nll[at]),
        mean_epistemic=float(generation.mean_epistemic[at]),
        max_epistemic=float(generation.max_epistemic[at]),
        disagreement=float(generation.disagreement[at]),
        effective_members=float(generation.effective_members[at]),
    )
    if not has_draws:
        return answer
    within, between = (x[at][:tokens] for x in (generation.within_members, generation.between_members))
    return answer._replace(
        within_members=within.tolist(),
        between_members=between.tolist(),
        mean_within_members=float(within.mean()),
        mean_between_members=float(between.mean()),
    )
