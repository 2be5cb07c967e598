"""From a request's body to an engine's requests, and from the engine's tokens to OpenAI's response or stream.

It knows the API's forms and nothing of HTTP. Read next: `forms.py`, the forms of responses; `app.py`, the routes.
"""

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from renyi.errors import ConfigError, DataError, EngineError
from renyi.inference.abstention import FIND_ONE, Abstention
from renyi.inference.generate import PromptRow, prompt_ids
from renyi.serve import forms
from renyi.serve.engine import Engine, EngineRequest, EngineToken, TokenStream
from renyi.serve.forms import Chosen
from renyi.serve.schemas import ChatBody, CompletionBody, SamplingBody, ScoreBody
from renyi.serve.writing import Writing, Written, echoed

# Arguments of the function that renders a chat. All others are variables of the template, which a client may set.
_NOT_OF_TEMPLATES = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
_COLDEST = (
    1e-4  # below, logits divided by the temperature leave the range of floats, and the likeliest token is certain
)
_COMPLETION_TOKENS = 16  # OpenAI's default of its older API


class UnknownModelError(ConfigError):
    """There is no model of this name."""


class TooLongError(ConfigError):
    """Prompt and answer have more tokens than the base reads."""


class TimeLimitError(EngineError):
    """An answer took longer than the server allows."""


@dataclass(frozen=True)
class AnswerLimits:
    """What one request may ask for.

    Attributes:
        max_tokens: the most tokens of an answer, and how many a chat's answer has at most unless it says.
        prompt_tokens: the most tokens of a prompt; None for the base's limit.
        answers: prompts × choices of a request.
        score_rows: rows of a request for scores.
        seconds: how long a request may take, waiting included.
    """

    max_tokens: int = 1024
    prompt_tokens: int | None = None
    answers: int = 16
    score_rows: int = 64
    seconds: float = 600.0


class Usage(NamedTuple):
    """What a request has used so far: tokens of its prompts, and tokens written."""

    prompt_tokens: int
    completion_tokens: int


class Answers:
    """Answers requests with an engine.

    Args:
        engine: what computes.
        model: the name of the mixture.
        members: the names of the members, [M].
        abstention: the folder's threshold, if it has one.
        limits: what one request may ask for.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        members: Sequence[str],
        abstention: Abstention | None = None,
        limits: AnswerLimits | None = None,
    ):
        self.engine, self.model, self.members = engine, model, list(members)
        self.abstention, self.limits = abstention, limits or AnswerLimits()
        self.created = int(time.time())
        self._encoder = ThreadPoolExecutor(1)  # one thread: a tokenizer is not made for several

    @property
    def names(self) -> list[str]:
        """Of all models: the mixture's, then the members'."""
        return [self.model, *self.members]

    def described(self, name: str) -> dict[str, Any]:
        """A model, in OpenAI's form.

        Raises:
            UnknownModelError: there is none of this name.
        """
        member = self._member(name)
        weight = None if member is None else self.engine.weights[member]
        kind = {"kind": "mixture", "members": self.members} if member is None else {"kind": "member"}
        found = {"id": name, "object": "model", "created": self.created, "owned_by": "renyi", **kind, "weight": weight}
        chats = bool(self.engine.tokenizer.chat_template)
        return {**found, "max_model_len": self.engine.positions, "has_chat_template": chats}

    def _member(self, name: str) -> int | None:
        if name == self.model:
            return None
        if name not in self.members:
            raise UnknownModelError(
                f"there is no model {name!r}", where="model", hint=f"There is {', '.join(self.names)}."
            )
        return self.members.index(name)

    # ---- Requests ----------------------------------------------------------------------------------------------------

    async def chat(self, body: ChatBody) -> "Task":
        """The task that a chat's body asks for.

        Raises:
            ConfigError, DataError: it cannot be done.
        """
        self._member(body.model)
        roles = {"developer": "system"}  # what models are trained with
        messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in body.messages]
        given = body.chat_template_kwargs or {}
        if wrong := sorted(_NOT_OF_TEMPLATES & given.keys()):  # a template of a client's own could loop for ever
            raise ConfigError(f"may not give {wrong[0]}", where="chat_template_kwargs", hint="Leave it out.")
        ids = await self._tokens({"prompt": messages, "chat_template_kwargs": given})
        wanted = body.max_completion_tokens or body.max_tokens
        return self._task(body, [ids], wanted, body.top_logprobs or 0, bool(body.logprobs))

    async def completion(self, body: CompletionBody) -> "Task":
        """The task that a completion's body asks for; see `chat`."""
        self._member(body.model)
        vocabulary = len(self.engine.tokenizer)
        prompts: list[list[int]] = []
        for number, prompt in enumerate(body.prompts, start=1):
            if isinstance(prompt, list):
                if max(prompt) >= vocabulary:
                    raise DataError(f"has a token {max(prompt)}, of {vocabulary:,}", where=f"prompt {number}")
                prompts.append(prompt)
            else:
                prompts.append(await self._tokens(prompt, number))
        wanted = body.max_tokens or min(_COMPLETION_TOKENS, self.limits.max_tokens)
        return self._task(body, prompts, wanted, body.logprobs or 0, body.logprobs is not None)

    async def _tokens(self, prompt: PromptRow, number: int = 1) -> list[int]:
        """The tokens of a prompt, found beside the event loop, which a long one would hold up."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._encoder, prompt_ids, prompt, self.engine.tokenizer, number)

    def _task(
        self, body: SamplingBody, prompts: list[list[int]], wanted: int | None, top: int, logprobs: bool
    ) -> "Task":
        member = self._member(body.model)
        choices = body.n or 1
        if len(prompts) * choices > self.limits.answers:
            raise ConfigError(
                f"asks for {len(prompts) * choices} answers, and the most is {self.limits.answers}",
                where="n",
                hint="Send several requests.",
            )
        abstention = self._abstention(body.withhold)
        settings = self._settings(body)
        requests = [
            EngineRequest(
                prompt=ids,
                max_new_tokens=self._room(ids, number, wanted),
                member=member,
                mixture=body.mixture,
                end_tokens=self.engine.end_tokens,
                settings=settings,
                # Choices differ; the first is what a request for one gets.
                seed=None if body.seed is None else _seed(body.seed, choice),
                alternatives=top,
                members=body.members,
                echo=isinstance(body, CompletionBody) and bool(body.echo),
            )
            for number, ids in enumerate(prompts, start=1)
            for choice in range(choices)
        ]
        return Task(self, body, requests, sum(map(len, prompts)), logprobs, abstention)

    def _settings(self, body: SamplingBody) -> dict[str, Any]:
        """How tokens are chosen: as the body says, else as the base's config says, else from the whole mixture."""
        settings = {"top_k": 0, **self.engine.generation_settings, **body.settings}
        temperature = settings.get("temperature", 1.0)
        if temperature < _COLDEST:
            kept = ("repetition_penalty",)
            return {"do_sample": False, **{name: settings[name] for name in kept if name in settings}}
        return {**settings, "temperature": float(temperature), "do_sample": True}

    def _room(self, ids: list[int], number: int, wanted: int | None) -> int:
        """How many tokens an answer to this prompt may have."""
        positions, limits = self.engine.positions, self.limits
        if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
            raise TooLongError(
                f"has {len(ids):,} tokens, and the most that this server takes is {limits.prompt_tokens:,}",
                where=f"prompt {number}",
            )
        if wanted is not None and wanted > limits.max_tokens:
            raise ConfigError(f"is {wanted:,}, and the most is {limits.max_tokens:,}", where="max_tokens")
        if positions is None:
            return wanted or limits.max_tokens
        room = positions - len(ids)
        if room < (wanted or 1):
            raise TooLongError(
                f"has {len(ids):,} tokens, its answer {wanted or 1:,}, and the model reads {positions:,} in all",
                where=f"prompt {number}",
            )
        return wanted or min(limits.max_tokens, room)

    def _abstention(self, withhold: bool) -> Abstention | None:
        found = self.abstention
        if withhold and found is None:
            raise ConfigError("the ensemble has no threshold", where="withhold", hint=FIND_ONE)
        if found is not None:
            try:
                found.check()
            except ConfigError:
                if withhold:
                    raise
                return None
        return found

    async def score(self, body: ScoreBody) -> dict[str, Any]:
        """The scores of rows, as `renyi score` gives them.

        Raises:
            ConfigError, DataError: a row is malformed, or there are too many.
        """
        if self._member(body.model) is not None:
            hint = f"Give {self.model}: log_likelihood has every member's."
            raise ConfigError("scores are the whole ensemble's", where="model", hint=hint)
        if len(body.rows) > self.limits.score_rows:
            raise ConfigError(
                f"are {len(body.rows)}, and the most is {self.limits.score_rows}",
                where="rows",
                hint="Send several requests.",
            )
        async with _in_time(self.limits.seconds):
            scores = await self.engine.score(body.rows)
        tokens = sum(score.tokens for score in scores)
        return {
            "object": "list",
            "model": body.model,
            "members": self.members,
            "data": [score._asdict() for score in scores],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


class Task:
    """A request for completions that has been checked: its answers, whole or as chunks.

    Attributes:
        used: tokens so far.
        finished: how each answer that is complete ended.
        sampled: how many of them are one member's and not the mixture's.
        on_first_token: called when the first token has come.
    """

    def __init__(
        self,
        answers: Answers,
        body: SamplingBody,
        requests: list[EngineRequest],
        prompt_tokens: int,
        logprobs: bool,
        abstention: Abstention | None,
    ):
        self._answers, self._body, self._requests = answers, body, requests
        self._logprobs, self._is_chat, self._abstention = logprobs, isinstance(body, ChatBody), abstention
        self._is_echo = any(request.echo for request in requests)
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
        }
        self._prompt_tokens = prompt_tokens
        self.finished: list[str] = []
        self.sampled = 0
        self.used = Usage(prompt_tokens, 0)
        self.on_first_token: Callable[[], object] = lambda: None

    @property
    def _names(self) -> list[str]:
        own = self._answers.members
        return own if self._body.model == self._answers.model else [self._body.model]

    def begin(self) -> "list[TokenStream]":
        """Hand the requests to the engine: all of them, or none.

        Raises:
            BusyError: the queue is full.
        """
        streams: list[TokenStream] = []
        try:
            for request in self._requests:
                streams.append(self._answers.engine.submit(request))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    async def response(self) -> dict[str, Any]:
        """The whole response."""
        done: dict[int, Chosen] = {}
        shown: dict[int, list[Written]] = {index: [] for index in range(len(self._requests))}
        async with aclosing(self._events(self.begin())) as events:
            async for index, written, chosen in events:
                shown[index] += written
                if chosen is not None:
                    done[index] = chosen
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._choice(done[index], shown[index]) for index in sorted(done)]
        return {**self._head, "object": kind, "choices": choices, "usage": forms.usage(*self.used)}

    async def chunks(self, streams: "list[TokenStream]") -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream, from what `begin` returned."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        options = self._body.stream_options
        tells_usage = options is not None and options.include_usage
        head = {**self._head, "object": kind, **({"usage": None} if tells_usage else {})}
        offsets = dict.fromkeys(range(len(self._requests)), 0)
        held: dict[int, list[Written]] = {index: [] for index in offsets}
        async with aclosing(self._events(streams)) as events:
            if self._is_chat:
                for index in offsets:
                    yield {**head, "choices": [self._delta(index, {"role": "assistant", "content": ""}, None)]}
            async for index, written, chosen in events:
                if self._body.withhold:  # nothing is said before it is known whether it may be
                    held[index] += written
                    written = held[index] if chosen is not None and not chosen.is_withheld else []
                text = "".join(w.text for w in written)
                logprobs = self._told(written, offsets[index]) if self._logprobs else None
                if text or (logprobs and logprobs.get("content", logprobs.get("tokens"))):
                    offsets[index] += len(text)
                    yield {**head, "choices": [self._delta(index, {"content": text}, logprobs)]}
                if chosen is not None:
                    delta = {"refusal": chosen.refusal()} if chosen.is_withheld and self._is_chat else {}
                    last = self._delta(index, delta, None)
                    last |= {"finish_reason": chosen.writing.finish, "uncertainty": forms.uncertainty(chosen)}
                    yield {**head, "choices": [last]}
        if tells_usage:
            yield {**head, "choices": [], "usage": forms.usage(*self.used)}

    def _delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        content = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": None}

    def _choice(self, chosen: Chosen, shown: list[Written]) -> dict[str, Any]:
        """One choice of a whole response. A withheld one has no text and no tokens."""
        is_withheld = chosen.is_withheld
        text = None if is_withheld else "".join(written.text for written in shown)
        refusal = chosen.refusal() if is_withheld else None
        content: dict[str, Any] = {"text": text or ""}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": refusal}}
        return {
            "index": chosen.index,
            **content,
            "logprobs": self._told(shown, 0) if self._logprobs and not is_withheld else None,
            "finish_reason": chosen.writing.finish,
            "uncertainty": forms.uncertainty(chosen),
        }

    def _told(self, written: list[Written], offset: int) -> dict[str, Any]:
        if self._is_chat:
            return forms.chat_logprobs(written, self._names, self._body.members)
        return forms.completion_logprobs(written, offset, self._names, self._body.members, self._is_echo)

    async def _events(self, streams: "list[TokenStream]") -> AsyncGenerator[tuple[int, list[Written], Chosen | None]]:
        """What may be shown of each choice as it comes; with its last event, the choice as a whole.

        Cancels what is left when it is closed, or when one answer fails.
        """
        came: asyncio.Queue[tuple[int, list[Written], Chosen | None] | Exception] = asyncio.Queue()
        readers = [asyncio.ensure_future(self._read(index, stream, came)) for index, stream in enumerate(streams)]
        try:
            left, ends = len(streams), asyncio.get_running_loop().time() + self._answers.limits.seconds
            while left:
                async with _in_time(self._answers.limits.seconds, ends):
                    event = await came.get()
                if isinstance(event, Exception):
                    raise event
                left -= event[2] is not None
                yield event
        finally:
            for reader in readers:
                reader.cancel()
            for stream in streams:
                stream.cancel()

    async def _read(self, index: int, stream: "TokenStream", came: "asyncio.Queue[Any]") -> None:
        request, body, tokenizer = self._requests[index], self._body, self._answers.engine.tokenizer
        weights = self._answers.engine.weights if request.member is None else [1.0]
        writing = Writing(tokenizer, weights, body.stops)
        prompt: list[EngineToken] = []
        try:
            async for token in stream:
                if request.echo and len(prompt) < len(request.prompt) - 1:
                    prompt.append(token)
                    continue
                if self.used.completion_tokens == 0:
                    self.on_first_token()
                self.used = Usage(self._prompt_tokens, self.used.completion_tokens + 1)
                if stream.sampled and body.withhold:
                    raise ConfigError(f"the answer cannot be judged: {stream.sampled.why}", where="withhold")
                before = echoed(tokenizer, request.prompt, prompt) if request.echo and not writing.tokens else []
                written = before + writing.add(token)
                chosen = None
                if writing.finish is not None:
                    sampled, mixture = stream.sampled, None if request.member is not None else request.mixture
                    stream.cancel()
                    self.finished.append(writing.finish)
                    self.sampled += sampled is not None
                    abstention = None if sampled else self._abstention  # of an uncertainty that is known exactly
                    own = (body.members, abstention, body.withhold)
                    chosen = Chosen(index, writing, self._names, mixture, sampled, *own)
                came.put_nowait((index, written, chosen))
                if chosen is not None:
                    return
        except Exception as error:
            came.put_nowait(error)


def _seed(seed: int, choice: int) -> int:
    """The seed of a further choice; it stays in the range of seeds."""
    return (seed + choice + 2**63) % 2**64 - 2**63


@asynccontextmanager
async def _in_time(seconds: float, ends: float | None = None) -> AsyncIterator[None]:
    """Raise `TimeLimitError` if what is inside has not ended after `seconds`, or at `ends` of the loop's clock."""
    try:
        async with asyncio.timeout(seconds) if ends is None else asyncio.timeout_at(ends):
            yield
    except TimeoutError as error:
        raise TimeLimitError(f"the request took longer than {seconds:g} s", hint="Ask for fewer tokens.") from error
