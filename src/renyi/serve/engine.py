"""What the server asks of an engine: answers as streams of tokens, and scores. It knows nothing of HTTP and of text.

An engine is whatever computes: ours in this process (`batching.py`), or another server's. The API (`answers.py`,
`app.py`) is the same for all of them: it makes prompts from messages, pieces of text from tokens, and looks for stop
strings. Read next: `batching.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from renyi.inference import Score


@dataclass(frozen=True)
class EngineRequest:
    """One answer that an engine is asked for.

    Attributes:
        prompt: token ids of the prompt, at least one.
        member: the only member that answers, counted from 0; None is the mixture of all members.
        mixture: "sequence", the mixture of sequences with running weights; "token", in which weights stay π; or
            "sampled": one member, drawn by its weight, answers alone, and all members rescore what it said.
        max_new_tokens: the most tokens of the answer, at least one. The API has checked that prompt and answer fit the
            base's positions.
        end_tokens: tokens that end an answer. Such a token is the answer's last.
        settings: how tokens are chosen, as transformers' `generate` names it: do_sample, temperature, top_p, top_k,
            min_p, repetition_penalty. A setting that is missing is the base's generation config's.
        seed: of the sampling; None draws one. The same request with the same seed gives the same answer.
        alternatives: how many of the mixture's likeliest tokens to name with each token.
        members: whether to name as many alternatives of each member as well.
        echo: whether the prompt's tokens come first, from the second one on: how likely the mixture finds each after
            those before it. Running weights then begin at π with the prompt, and at π again with the answer.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    member: int | None = None
    mixture: str = "sequence"
    end_tokens: Sequence[int] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    alternatives: int = 0
    members: bool = False
    echo: bool = False


class Alternative(NamedTuple):
    """A token that could have come instead, and its log-probability in nats."""

    token: int
    log_prob: float


class EngineToken(NamedTuple):
    """One token of an answer from K members: M, or 1 where a member answers alone.

    Log-probabilities and uncertainties are those before temperature and other settings, in nats, as in
    `renyi.ensemble.Generation`.

    Attributes:
        token: its id.
        log_prob: under the mixture.
        weights: [K], running weights of the members that it was predicted with.
        member_log_probs: [K], under each member.
        total, aleatoric, epistemic: uncertainty of the mixture about this token.
        variation_ratio: the weight of the members whose likeliest token was not that of most.
        alternatives: the mixture's likeliest tokens, likeliest first.
        member_alternatives: [K], each member's, where they were asked for; else empty.
        finish: "stop" at one of the request's end tokens, "length" at its last token, else None.
    """

    token: int
    log_prob: float
    weights: Sequence[float]
    member_log_probs: Sequence[float]
    total: float
    aleatoric: float
    epistemic: float
    variation_ratio: float
    alternatives: Sequence[Alternative] = ()
    member_alternatives: Sequence[Sequence[Alternative]] = ()
    finish: str | None = None


class Sampled(NamedTuple):
    """That a member answered alone for the mixture.

    What its tokens say of likelihoods, weights and votes is the mixture's all the same. `total`, `aleatoric` and
    `epistemic` are lower bounds, and `alternatives` may lack some; see `renyi.serve.rescored`.

    Attributes:
        member: which one, drawn by its weight.
        why: why the members could not answer together, or that they were not asked to.
    """

    member: int
    why: str


class TokenStream(ABC, AsyncIterator[EngineToken]):
    """The tokens of one answer as they come. It ends after the token whose `finish` is not None.

    `__anext__` raises `EngineError` if the engine failed on this answer.

    Attributes:
        sampled: how the answer came about, where it is one member's and not the mixture's; known with the first token.
    """

    sampled: Sampled | None = None

    @abstractmethod
    def cancel(self) -> None:
        """Stop the work: the request's rows are free within one step, also while its prompt is read. May be called
        from the event loop at any time and more than once; after the end it does nothing.
        """


class Load(NamedTuple):
    """How busy an engine is: requests that it answers, requests that wait, and KV cache tokens in use."""

    running: int
    waiting: int
    cached_tokens: int


class Engine(ABC):
    """Computes answers and scores of an ensemble of M members. All methods are called from one event loop.

    Attributes:
        tokenizer: of the base, with the chat template that training used.
        weights: mixture weights π, [M].
        positions: the most tokens of prompt and answer together; None for no limit.
        end_tokens: what ends an answer by default.
        generation_settings: the base's generation config's values of `EngineRequest.settings`, where it has some.
    """

    tokenizer: PreTrainedTokenizerBase
    weights: Sequence[float]
    positions: int | None
    end_tokens: Sequence[int]
    generation_settings: Mapping[str, Any]

    @property
    def num_members(self) -> int:
        return len(self.weights)

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it takes requests: the model is loaded, and the engine has neither failed nor stopped."""

    @abstractmethod
    async def start(self) -> None:
        """Begin to take requests; returns when ready."""

    @abstractmethod
    async def stop(self) -> None:
        """End. Answers in progress raise `EngineError`."""

    @abstractmethod
    def submit(self, request: EngineRequest) -> TokenStream:
        """Take a request, or refuse it at once.

        Raises:
            BusyError: as many requests wait as may.
            ConfigError: a setting is impossible for this engine.
            EngineError: the engine is not running.
        """

    @abstractmethod
    async def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Scores of rows of any of TRL's forms, prepared as in training, equal to those of `renyi score`.

        A cancelled call stops the work.

        Raises:
            DataError: a row is malformed.
            BusyError: as many requests wait as may.
        """

    @abstractmethod
    def load(self) -> Load:
        """How busy it is now."""
