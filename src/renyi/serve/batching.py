"""Our engine: one thread that owns the model and answers all requests in steps (continuous batching).

A step reads the base once for everything in flight: the last token of every answer that is being written, and a chunk
of prompts that are being read. A request begins when there is room, and leaves when it has ended or was cancelled; none
waits for another to end. Each request has its own KV cache, running weights, sampler and limits, so its answer is the
one of `LoraEnsemble.generate` whatever else is in flight, but for rounding in the matrix products.

Between steps a batch of rows is scored, if there are any. Read next: `renyi.ensemble.in_flight`, the forward of a step.
"""

import asyncio
import copy
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi.data import Limits
from renyi.ensemble.choosing import Step, TokenChoice, step
from renyi.ensemble.decode import token_choice
from renyi.ensemble.in_flight import Flight, InFlight
from renyi.errors import BusyError, ConfigError, EngineError, RenyiError
from renyi.inference import Score
from renyi.inference.generate import end_tokens
from renyi.objectives import mixture_log_probs
from renyi.runs.load import Loaded
from renyi.serve.engine import Alternative, Engine, EngineRequest, EngineToken, Load, TokenStream
from renyi.serve.memory import FreedMemory

logger = logging.getLogger(__name__)

_SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class EngineLimits:
    """What our engine takes on at once.

    Attributes:
        running: requests that are answered together.
        waiting: requests that wait; one more is refused.
        step_tokens: prompt tokens that a step reads, summed over members' rows. More would let the answers in progress
            wait longer.
        cached_tokens: tokens of prompts and answers in KV caches, of all running requests together and for one member;
            None for no limit.
    """

    running: int = 64
    waiting: int = 256
    step_tokens: int = 512
    cached_tokens: int | None = None


class OurEngine(Engine):
    """Answers with an ensemble in this process.

    Args:
        loaded: the ensemble's folder, as `renyi.load` opens it. From `start` to `stop` nothing else may use it.
        limits: what it takes on at once.

    Raises:
        ConfigError: this kind of base cannot answer several requests at once; see `InFlight`.
    """

    def __init__(self, loaded: Loaded, limits: EngineLimits | None = None):
        loaded.ensemble.check_writes()
        self._loaded, self._limits = loaded, limits or EngineLimits()
        self._in_flight = InFlight(loaded.ensemble)
        # Tokenizers are not made for two threads. The thread of the model has `loaded.tokenizer`, to prepare rows.
        self.tokenizer = copy.deepcopy(loaded.tokenizer)
        self.weights = loaded.ensemble.weights.tolist()
        self.positions = Limits.of(loaded.ensemble.base).positions
        self.end_tokens = end_tokens(loaded.ensemble, loaded.tokenizer)
        config = loaded.ensemble.generation_config
        self.generation_settings = {
            name: value for name in _SETTINGS if (value := getattr(config, name, None)) is not None
        }
        self._changed = threading.Condition()
        self._waiting: deque[_Answer] = deque()
        self._running: list[_Answer] = []
        self._scoring: deque[_Scoring] = deque()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self.steps = 0

    # ---- Called from the event loop ----------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="renyi-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, request: EngineRequest) -> TokenStream:
        needed, most = len(request.prompt) + request.max_new_tokens, self._limits.cached_tokens
        if most is not None and needed > most:
            raise ConfigError(
                f"prompt and answer may have {needed:,} tokens, and the server keeps {most:,} in all",
                where="max_tokens",
                hint="Ask for fewer tokens, or shorten the prompt.",
            )
        if request.mixture == "sampled" and request.member is None:
            hint = "Leave it out: here members answer together."
            raise ConfigError('"sampled" is for a server with --engine vllm', where="mixture", hint=hint)
        answer = _Answer(request, _OurStream(self))
        with self._changed:
            self._accept(len(self._waiting))
            self._waiting.append(answer)
            self._changed.notify()
        return answer.stream

    async def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        found: asyncio.Future[list[Score]] = asyncio.get_running_loop().create_future()
        job = _Scoring([dict(row) for row in rows], found)
        with self._changed:
            self._accept(len(self._scoring))
            self._scoring.append(job)
            self._changed.notify()
        try:
            return await found
        finally:
            job.is_cancelled = True

    def load(self) -> Load:
        with self._changed:
            cached = sum(answer.flight.length for answer in self._running)
            return Load(len(self._running), len(self._waiting) + len(self._scoring), cached)

    def wake(self) -> None:
        """Let the thread look for what has changed."""
        with self._changed:
            self._changed.notify()

    def _accept(self, waiting: int) -> None:
        if not self.is_ready:
            raise EngineError("the engine does not run", hint="The server is starting or ending.")
        if waiting >= self._limits.waiting:
            raise BusyError(f"{waiting} requests wait already", hint="Try again later.")

    # ---- The thread of the model -------------------------------------------------------------------------------------

    def _run(self) -> None:
        freed = FreedMemory()
        with torch.inference_mode(), self._loaded.ensemble.inference():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_stopping or self._waiting or self._running or self._scoring)
                    if self._is_stopping:
                        break
                    self._admit()
                    running = list(self._running)
                if running:
                    self._step(running)
                if self._scoring:
                    self._score_some(self._scoring[0])
                freed.give_back()
        with self._changed:
            left = [*self._running, *self._waiting]
            jobs = list(self._scoring)
            self._running.clear()
            self._waiting.clear()
            self._scoring.clear()
        error = EngineError("the server ended before the answer was complete")
        self._deliver([(answer.stream, error) for answer in left])
        for job in jobs:
            self._resolve(job, error)

    def _admit(self) -> None:
        """Drop requests that were cancelled, and begin with those that wait while there is room, in their order."""
        self._running = [answer for answer in self._running if not answer.stream.is_cancelled]
        self._waiting = deque(answer for answer in self._waiting if not answer.stream.is_cancelled)
        most = self._limits.cached_tokens
        cached = sum(answer.needed for answer in self._running)
        while self._waiting and len(self._running) < self._limits.running:
            cached += self._waiting[0].needed
            if most is not None and cached > most:
                break
            self._running.append(self._waiting.popleft())

    def _step(self, running: list["_Answer"]) -> None:
        """Read the new tokens of all running requests, and choose the next token of those whose prompt is read."""
        told: list[tuple[_OurStream, EngineToken | Exception]] = []
        work: list[tuple[_Answer, list[int]]] = []
        budget = max(1, self._limits.step_tokens // self._loaded.ensemble.num_members)
        for answer in running:
            try:
                answer.begin(self._loaded)
            except Exception as error:
                told.append((answer.stream, _told(error)))
                answer.is_over = True
                continue
            chunk = answer.unread[: 1 if answer.written else budget]
            budget -= 0 if answer.written else len(chunk)
            if chunk:
                work.append((answer, chunk))
        try:
            found = self._in_flight([(answer.flight, chunk) for answer, chunk in work]) if work else []
            self.steps += 1
        except Exception as error:
            logger.exception("a step failed")
            told += [(answer.stream, _told(error)) for answer, _ in work]
            for answer, _ in work:
                answer.is_over = True
            found = []
        for (answer, chunk), logits_KNV in zip(work, found, strict=False):
            del answer.unread[: len(chunk)]
            try:
                if answer.flight.keeps_all and not answer.written:
                    told += [(answer.stream, token) for token in answer.echoed(chunk, logits_KNV)]
                if not answer.unread:
                    told.append((answer.stream, answer.next_token(logits_KNV[:, -1:])))
            except Exception as error:
                told.append((answer.stream, _told(error)))
                answer.is_over = True
        with self._changed:
            self._running = [answer for answer in self._running if not answer.is_over]
        self._deliver(told)

    def _score_some(self, job: "_Scoring") -> None:
        """Prepare a job's rows, or score some of them."""
        try:
            if not job.is_cancelled:
                job.advance(self._loaded, self._limits.step_tokens)
        except Exception as error:
            self._resolve(job, _told(error))
        else:
            if not job.is_cancelled and not job.is_done:
                return
            if job.is_done:
                self._resolve(job, sorted(job.scores))
        with self._changed:
            self._scoring.popleft()

    def _deliver(self, told: list[tuple["_OurStream", "EngineToken | Exception"]]) -> None:
        def give() -> None:
            for stream, item in told:
                stream.give(item)

        if told:
            self._call(give)

    def _resolve(self, job: "_Scoring", result: "list[Score] | Exception") -> None:
        def give() -> None:
            if job.found.done():
                return
            if isinstance(result, Exception):
                job.found.set_exception(result)
            else:
                job.found.set_result(result)

        self._call(give)

    def _call(self, give: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(give)


class _OurStream(TokenStream):
    """Hands tokens from the thread of the model to the event loop."""

    def __init__(self, engine: OurEngine):
        self._engine = engine
        self._items: asyncio.Queue[EngineToken | Exception] = asyncio.Queue()
        self._has_ended = False
        self.is_cancelled = False

    def give(self, item: EngineToken | Exception) -> None:
        self._items.put_nowait(item)

    def cancel(self) -> None:
        if not self._has_ended:
            self.is_cancelled = self._has_ended = True
            self._engine.wake()

    async def __anext__(self) -> EngineToken:
        if self._has_ended:
            raise StopAsyncIteration
        item = await self._items.get()
        self._has_ended = isinstance(item, Exception) or item.finish is not None
        if isinstance(item, Exception):
            raise item
        return item


class _Answer:
    """A request that waits or is being answered. Except for `stream`, only the thread of the model touches it."""

    def __init__(self, request: EngineRequest, stream: _OurStream):
        self.request, self.stream = request, stream
        self.needed = len(request.prompt) + request.max_new_tokens
        self.flight = Flight(request.member, keeps_all=request.echo)
        self.unread = list(request.prompt)
        self.written = 0
        self.is_over = False
        self._choice: TokenChoice | None = None
        self._ids: Tensor
        self._log_w: Tensor
        self._log_w_echo: Tensor

    def begin(self, loaded: Loaded) -> None:
        """Set the sampler and the weights up, before the first step."""
        if self._choice is not None:
            return
        request, ensemble = self.request, loaded.ensemble
        self._ids = torch.tensor([list(request.prompt)], device=ensemble.device)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        settings = {"max_new_tokens": request.max_new_tokens, **request.settings}
        self._choice = token_choice(ensemble.base, self._ids, seed, **settings)
        weights = ensemble.weights if request.member is None else ensemble.weights.new_ones(1)
        self._log_w = self._log_w_echo = weights.double().log().log_softmax(0)[:, None]

    def echoed(self, chunk: Sequence[int], logits_KNV: Tensor) -> Iterator[EngineToken]:
        """What the mixture made of the prompt's tokens that follow those of a chunk."""
        for at, token in enumerate([*chunk[1:], *self.unread[:1]]):
            given, log_w = self._ids.new_tensor([token]), self._log_w_echo

            def known(ids: Tensor, scores: Tensor, given: Tensor = given) -> Tensor:
                return given

            now = self._step(logits_KNV[:, at : at + 1], log_w, known)
            self._log_w_echo = now.log_weights
            yield self._token(now, log_w, None)

    def next_token(self, logits_K1V: Tensor) -> EngineToken:
        """The token that follows what has been read."""
        assert self._choice is not None
        request, log_w = self.request, self._log_w
        now = self._step(logits_K1V, log_w, self._choice)
        token = int(now.tokens)
        self._log_w, self._ids = now.log_weights, torch.cat([self._ids, now.tokens[:, None]], dim=-1)
        self.unread.append(token)
        self.written += 1
        is_last = self.written == request.max_new_tokens
        finish = "stop" if token in request.end_tokens else "length" if is_last else None
        self.is_over = finish is not None
        return self._token(now, log_w, finish)

    def _step(
        self, logits_K1V: Tensor, log_w: Tensor, choice: TokenChoice | Callable[[Tensor, Tensor], Tensor]
    ) -> Step:
        return step(logits_K1V, log_w, self._ids, choice, self.request.mixture == "token")

    def _token(self, now: Step, log_w: Tensor, finish: str | None) -> EngineToken:
        """A token, and what the mixture with these running weights made of it."""
        request, token = self.request, int(now.tokens)
        log_prob = float((log_w + now.log_probs).logsumexp(0))
        several = request.alternatives
        mixed = _likeliest(mixture_log_probs(now.log_p, log_w), several)[0] if several else ()
        return EngineToken(
            token=token,
            log_prob=log_prob,
            weights=log_w.exp()[:, 0].tolist(),
            member_log_probs=now.log_probs[:, 0].tolist(),
            total=float(now.uncertainty.total),
            aleatoric=float(now.uncertainty.aleatoric),
            epistemic=float(now.uncertainty.epistemic),
            variation_ratio=float(now.uncertainty.variation_ratio),
            # The token's own value to the last digit: lm-evaluation-harness compares the two.
            alternatives=[Alternative(other, log_prob if other == token else value) for other, value in mixed],
            member_alternatives=_likeliest(now.log_p[:, 0], several) if request.members and several else (),
            finish=finish,
        )


def _likeliest(log_p_RV: Tensor, several: int) -> list[tuple[Alternative, ...]]:
    """The likeliest tokens of each row."""
    top = log_p_RV.topk(min(several, log_p_RV.shape[-1]), dim=-1)
    return [
        tuple(Alternative(token, value) for token, value in zip(tokens, values, strict=True))
        for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


class _Scoring:
    """Rows that are to be scored, some at a time."""

    def __init__(self, rows: list[dict[str, Any]], found: "asyncio.Future[list[Score]]"):
        self.rows, self.found = rows, found
        self.scores: list[Score] = []
        self.is_cancelled = False
        self._prepared: Any = None
        self._order: list[int] = []

    @property
    def is_done(self) -> bool:
        return self._prepared is not None and len(self.scores) == len(self.rows)

    def advance(self, loaded: Loaded, tokens: int) -> None:
        """Prepare the rows, as training did; at the next calls score some, of about `tokens` over members."""
        if self._prepared is None:
            self._prepared = loaded.prepare(self.rows, name="rows")
            lengths = [len(ids) for ids in self._prepared["input_ids"]]
            self._order = sorted(range(len(lengths)), key=lengths.__getitem__)
            return
        done, widest = len(self.scores), max(1, 4 * tokens // loaded.ensemble.num_members)
        some = [self._order[done]]
        for index in self._order[done + 1 :]:
            if (len(some) + 1) * len(self._prepared[index]["input_ids"]) > widest:
                break
            some.append(index)
        found = loaded.score(self._prepared.select(some))
        self.scores += [score._replace(index=index) for score, index in zip(found, some, strict=True)]


def _told(error: Exception) -> Exception:
    """An error as a client may see it: ours as they are, others by their kind, without what they quote."""
    if isinstance(error, RenyiError):
        return error
    logger.error("the engine failed", exc_info=error)
    return EngineError(f"the engine failed ({type(error).__name__})")
