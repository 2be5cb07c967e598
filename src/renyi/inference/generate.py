"""From prompts to answers: text in, text out, with how sure the ensemble is of every token.

It knows a tokenizer and its chat template. How members are mixed it leaves to `LoraEnsemble.generate`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi.ensemble import Generation, LoraEnsemble
from renyi.errors import DataError

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]  # plain text, or the messages of a chat


class Answer(NamedTuple):
    """An answer of N tokens, mixed from K members: M, or 1 where a member spoke alone.

    Attributes:
        text: without special tokens.
        token_ids: the end-of-text token, if there is one, included.
        tokens: the piece of `text` that each token added, "" for special tokens and for those that end within a
            character.
        log_prob: [N], of each token under the mixture, nats.
        weights: [N][K], running weights of the members that each token was predicted with.
        total: [N], entropy of the mixture, nats.
        aleatoric: [N], its part that the members have each by themselves.
        epistemic: [N], its part that is their disagreement.
        member_log_likelihood: [K], log p_m(answer | prompt), nats.
        mixture_nll: −log of the answer's probability under the mixture, nats.
        mean_epistemic: over the tokens.
        max_epistemic: of one token.
        disagreement: mean weight of members whose likeliest token was not that of most.
        effective_members: how many members explain the answer, 1 to K.
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


def generate(
    ensemble: LoraEnsemble,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    seed: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
    **settings: Any,
) -> list[Any]:
    """Answer prompts.

    Args:
        ensemble: M members.
        prompts: plain text, tokenised as it is, or messages with `role` and `content`, which the tokenizer's chat
            template opens an answer to.
        tokenizer: of the base.
        batch_size: prompts decoded together; their order is kept.
        seed: of the sampling, plus one for each further batch; None is torch's global generator.
        progress: called after each batch with the number of prompts done.
        settings: of `LoraEnsemble.generate`: mixture, member, max_new_tokens, do_sample, temperature, …. By default an
            answer ends at the base's end-of-text tokens and at the tokenizer's.

    Returns:
        An `Answer` for each prompt; with mixture="member" and no `member` a list of M answers, one a member.

    Raises:
        DataError: a prompt has no token, or its messages do not fit the chat template.
        ConfigError: as `LoraEnsemble.generate`.
    """
    rows = [prompt_ids(prompt, tokenizer, number) for number, prompt in enumerate(prompts, start=1)]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = end_tokens(ensemble, tokenizer)
    settings = {"tokenizer": tokenizer, "pad_token_id": pad, **({"eos_token_id": ends} if ends else {}), **settings}
    answers: list[Any] = []
    for batch, start in enumerate(range(0, len(rows), batch_size)):
        input_ids, attention_mask = _left_padded(rows[start : start + batch_size], pad)
        generation = ensemble.generate(
            input_ids, attention_mask, seed=None if seed is None else seed + batch, **settings
        )
        answers += _answers(generation, tokenizer)
        progress(len(answers))
    return answers


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, number: int = 1) -> list[int]:
    """The tokens of a prompt, number `number` to an error.

    Raises:
        DataError: there are none, or the messages do not fit the chat template.
    """
    where = f"prompt {number}"
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif not tokenizer.chat_template:
        raise DataError(
            "is a chat, and the tokenizer has no chat template", where=where, hint="Give plain text, or a template."
        )
    else:
        chat: Any = [dict(message) for message in prompt]
        template: Any = tokenizer.apply_chat_template
        try:
            ids = list(template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
        except Exception as error:  # a template is a program, and raises what it likes
            raise DataError(
                f"does not fit the chat template ({error})", where=where, hint="Messages have a role and a content."
            ) from error
    if not ids:
        raise DataError("is empty", where=where, hint="Give some text to continue.")
    return ids


def end_tokens(ensemble: LoraEnsemble, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the base's, and the tokenizer's, which fine-tuning may have changed."""
    of_base = ensemble.generation_config.eos_token_id
    found = [of_base] if isinstance(of_base, int) else list(of_base or [])
    return list(dict.fromkeys([*found, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))


class Pieces:
    """What each token adds to the text without special tokens; they join to it, if no token changes those before it.

    Decoded from the beginning each time: what a token looks like depends on those before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """The piece of the next token; "" for half a character, which the token that completes it will show."""
        self.ids.append(token)
        whole = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        before, self.text = self.text, whole
        return whole[len(before) :] if whole.startswith(before) else str(self.tokenizer.decode([token]))


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    input_ids = torch.tensor([[pad] * empty + row for empty, row in zip(padding, rows, strict=True)])
    return input_ids, torch.tensor([[0] * n + [1] * (longest - n) for n in padding])


def _answers(generation: Generation, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """One a row; where every member has rows of its own, a list of them."""
    on_cpu = Generation(*(value.cpu() for value in generation))
    if on_cpu.mask.dim() == 2:
        return [_answer(on_cpu, (row,), tokenizer) for row in range(len(on_cpu.mask))]
    members, batch, _ = on_cpu.mask.shape
    return [[_answer(on_cpu, (m, row), tokenizer) for m in range(members)] for row in range(batch)]


def _answer(generation: Generation, at: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> Answer:
    tokens = int(generation.mask[at].sum())
    ids = generation.new_tokens[at][:tokens].tolist()
    every: tuple[Any, ...] = (slice(None), *at)
    pieces = Pieces(tokenizer)
    return Answer(
        text=str(tokenizer.decode(ids, skip_special_tokens=True)),
        token_ids=ids,
        tokens=[pieces.add(token) for token in ids],
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
