"""vLLM as the engine: every request becomes a group of M requests, one for each member, to one of several replicas.

The members run in `vllm serve` with the plugin `renyi.vllm`, which writes the mixture to the rows of a group. So all
members answer with the same tokens. This engine gathers their streams to one: it takes each member's own
log-probabilities from its stream, and the uncertainty from the plugin's records. It trusts nothing: a token that
differs between members, or that has no record, ends the answer with an error.

Where a group cannot run together, one member, drawn by its weight, answers alone, and all members rescore its answer.
That is a sample of the mixture of sequences, and what is said of its tokens is in `rescored.py`. The stream says so.

Nothing of the base is loaded here. Read next: `replica.py`.
"""

import asyncio
import logging
import math
import random
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, GenerationConfig

from renyi import data
from renyi.data import Preparation, load_tokenizer_of
from renyi.ensemble.storage import read_ensemble, resolve_folder
from renyi.errors import BusyError, ConfigError, DataError, EngineError
from renyi.inference import Score
from renyi.inference.abstention import Abstention, read_abstention
from renyi.inference.score import scores_of
from renyi.serve.engine import Alternative, Engine, EngineRequest, EngineToken, Load, Sampled, TokenStream
from renyi.serve.replica import MemberToken, Replica, ReplicaAddress
from renyi.serve.rescored import rescored
from renyi.vllm.groups import MOST_ALTERNATIVES, Membership

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What transformers' `generate` takes where neither the request nor the base's generation config says.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}


class VllmEngine(Engine):
    """Answers with an ensemble whose members run in vLLM.

    Args:
        folder: of the ensemble, or a hub id.
        replicas: where its members are served, each by its folder's name.
        base: the base model, if it is no longer where the ensemble says. Its configs are read, not its weights.
        key: of the replicas' API.
        most: requests that run or wait at once; one more is refused.

    Raises:
        EnsembleFormatError: it is no ensemble.
        TokenizerError: there is no tokenizer.
    """

    def __init__(
        self,
        folder: str | Path,
        replicas: Sequence[ReplicaAddress],
        base: str | None = None,
        key: str | None = None,
        most: int = 320,
    ):
        self.folder = resolve_folder(folder)
        manifest = read_ensemble(self.folder, base)
        named = base or manifest.base_model
        config = AutoConfig.from_pretrained(named).get_text_config()
        self._manifest, self._most = manifest, most
        self._limits = data.Limits(getattr(config, "max_position_embeddings", None), config.vocab_size)
        self._preparation = Preparation.read(self.folder)
        self.tokenizer = load_tokenizer_of(self.folder, named)
        self.weights, self.positions = list(manifest.weights), self._limits.positions
        self._members = list(manifest.members)
        settings = _generation_config(named)
        ends = settings.eos_token_id
        of_base = [ends] if isinstance(ends, int) else list(ends or [])
        self.end_tokens = list(dict.fromkeys([*of_base, *data.end_tokens(self.tokenizer)]))
        self.generation_settings = {
            name: value for name in _SETTINGS if (value := getattr(settings, name, None)) is not None
        }
        self._prefix = f"{secrets.token_hex(4)}-"
        self._addresses, self._key = list(replicas), key
        self._replicas: list[Replica] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: set[_GroupStream] = set()
        self._scoring = 0

    @property
    def abstention(self) -> Abstention | None:
        """The threshold above which to abstain; None if none was found yet."""
        return read_abstention(self.folder)

    @property
    def is_ready(self) -> bool:
        return bool(self._tasks) and any(replica.is_up for replica in self._replicas)

    async def check(self) -> None:
        """Raise `EngineError` unless a replica is up."""
        await self.start()
        reasons = "; ".join(f"{replica.address.api}: {replica.why}" for replica in self._replicas)
        is_ready = self.is_ready
        await self.stop()
        if not is_ready:
            raise EngineError(
                f"no vLLM can be used ({reasons})",
                hint="Start `vllm serve` as docs/serving.md says: with renyi.vllm, and its records within reach.",
            )

    async def start(self) -> None:
        """Connect to the replicas. It is ready while one of them is up; those that are down are asked again."""
        self._replicas = [Replica(address, self._key, self._prefix, self._members) for address in self._addresses]
        self._tasks = [asyncio.create_task(replica.run()) for replica in self._replicas]
        await asyncio.gather(*(replica.was_asked.wait() for replica in self._replicas))
        for replica in self._replicas:
            if replica.is_up:
                self.positions = min(self.positions or math.inf, replica.facts["positions"])

    async def stop(self) -> None:
        for stream in list(self._streams):
            stream.end(EngineError("the server ended before the answer was complete"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def submit(self, request: EngineRequest) -> TokenStream:
        replica = self._choose()
        members = [(request.member, 1.0)] if request.member is not None else list(enumerate(self.weights))
        stream = _GroupStream(
            request,
            _body(request, self.generation_settings),
            replica,
            f"{self._prefix}{secrets.token_hex(8)}",
            [self._members[member] for member, _ in members],
            [weight for _, weight in members],
            self._why_sampled(request, replica, len(members)),
            min(MOST_ALTERNATIVES, self._limits.vocabulary or MOST_ALTERNATIVES),
        )
        self._streams.add(stream)
        stream.begin(self._streams.discard)
        return stream

    def _why_sampled(self, request: EngineRequest, replica: Replica, size: int) -> str | None:
        """Why a request cannot be a group of this size at once; None if it may be one.

        Raises:
            ConfigError: neither a group nor one member could answer as it asks.
        """
        several, most = len(request.prompt), replica.facts["step_tokens"]
        is_sampled = request.mixture == "sampled" and size > 1
        if several * size <= most:
            return "the request asks for it" if is_sampled else None
        why = f"has {several:,} tokens, and vLLM reads {most:,} in a step for {size} members"
        if request.mixture == "token" or several > most or size == 1:
            raise ConfigError(why, where="prompt", hint="Shorten it, or start vLLM with more --max-num-batched-tokens.")
        return "the request asks for it" if is_sampled else f"the prompt {why}"

    async def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        prepared = await asyncio.to_thread(self._prepared, [dict(row) for row in rows])
        replica = self._choose()
        for number, ids in enumerate(prepared["input_ids"], start=1):
            if len(ids) >= min(replica.facts["positions"], replica.facts["step_tokens"]):
                raise DataError(f"has {len(ids):,} tokens, more than vLLM reads", where=f"row {number}")
        several = self.num_members * len(prepared["input_ids"])
        self._scoring, replica.rows = self._scoring + 1, replica.rows + several
        try:
            return await self._scored(replica, prepared["input_ids"], prepared["labels"])
        finally:
            self._scoring, replica.rows = self._scoring - 1, replica.rows - several

    def load(self) -> Load:
        cached = sum(len(stream.request.prompt) + stream.position for stream in self._streams)
        begun = sum(stream.position > 0 for stream in self._streams)
        return Load(begun, len(self._streams) - begun + self._scoring, cached)

    def _choose(self) -> Replica:
        """The replica with the least to do."""
        there = [replica for replica in self._replicas if replica.is_up]
        if not there:
            raise EngineError("no vLLM is up", hint="Try again later.")
        waiting = len(self._streams) + self._scoring
        if waiting >= self._most:
            raise BusyError(f"{waiting} requests run or wait already", hint="Try again later.")
        return min(there, key=lambda replica: replica.rows)

    def _prepared(self, rows: list[dict[str, Any]]) -> Any:
        return data.prepare(data.read_rows(rows), self.tokenizer, self._preparation, "rows", self._limits)

    async def _scored(
        self, replica: Replica, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
    ) -> list[Score]:
        async def log_likelihood(model: str, row: int) -> float:
            async with replica.capacity.room_for(1):
                found = await replica.prompt_log_probs(model, ids[row])
            told = zip(found, ids[row][1:], labels[row][1:], strict=True)
            return math.fsum(each[token] for each, token, label in told if label != data.IGNORED)

        works = [log_likelihood(model, row) for model in self._members for row in range(len(ids))]
        ell_MB = torch.tensor(await _all_of(works)).view(self.num_members, len(ids))
        tokens_B = torch.tensor([sum(label != data.IGNORED for label in row[1:]) for row in labels])
        manifest = self._manifest
        weights = torch.tensor(self.weights)
        return scores_of(range(len(ids)), ell_MB, tokens_B, manifest.alpha, weights, manifest.routing_quantity)


class _GroupStream(TokenStream):
    """The members' streams as one.

    Args:
        request: what is asked for.
        body: of vLLM's API.
        replica: that answers.
        group: its name, which no other has.
        models: names of the members' models, [K].
        weights: the members' mixture weights, [K].
        why: why one member has to answer alone; None if they can answer together.
        likeliest: how many tokens members name where they rescore.
    """

    def __init__(
        self,
        request: EngineRequest,
        body: dict[str, Any],
        replica: Replica,
        group: str,
        models: Sequence[str],
        weights: Sequence[float],
        why: str | None,
        likeliest: int,
    ):
        self.request, self.position = request, 0
        self._body, self._replica, self._group = body, replica, group
        self._models, self._weights = list(models), list(weights)
        self._why, self._likeliest = why, likeliest
        self._items: asyncio.Queue[EngineToken | Exception] = asyncio.Queue()
        self._has_ended = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, done: Callable[["_GroupStream"], object]) -> None:
        """Begin to answer; `done` is called when the work has ended."""
        self._task = asyncio.create_task(self._run())
        self._replica.rows += len(self._models)

        def end(task: object) -> None:
            self._replica.rows -= len(self._models)
            done(self)

        self._task.add_done_callback(end)

    def cancel(self) -> None:
        self._has_ended = True
        if self._task is not None:
            self._task.cancel()

    def end(self, error: Exception) -> None:
        self._items.put_nowait(error)
        if self._task is not None:
            self._task.cancel()

    async def __anext__(self) -> EngineToken:
        if self._has_ended:
            raise StopAsyncIteration
        item = await self._items.get()
        self._has_ended = isinstance(item, Exception) or item.finish is not None
        if isinstance(item, Exception):
            raise item
        return item

    async def _run(self) -> None:
        request, why = self.request, self._why
        try:
            if request.echo:
                for token in await self._rescored(request.prompt):
                    self._items.put_nowait(token)
            if why is None:
                async with self._replica.capacity.room_for(len(self._models)):
                    why = await self._gather()
            if why is not None:
                await self._sample(why)
        except EngineError as error:
            self._items.put_nowait(error)
        except Exception as error:
            logger.exception("an answer from vLLM failed")
            self._items.put_nowait(EngineError(f"the engine failed ({type(error).__name__})"))

    async def _gather(self) -> str | None:
        """Answer together. Returns why that could not begin; None if the answer is complete."""
        request, replica, group = self.request, self._replica, self._group
        own = ("token" if request.mixture == "token" else "sequence", request.alternatives, request.members)
        replica.expect(group)
        found: asyncio.Queue[tuple[int, MemberToken | Exception | None]] = asyncio.Queue()
        tasks = [
            asyncio.create_task(
                _read(
                    replica,
                    Membership(group, member, tuple(self._weights), *own),
                    {**self._body, "model": model},
                    found,
                )
            )
            for member, model in enumerate(self._models)
        ]
        ahead: list[deque[MemberToken | None]] = [deque() for _ in tasks]
        try:
            while True:
                while not all(ahead):
                    member, item = await found.get()
                    if isinstance(item, Exception):
                        raise item
                    ahead[member].append(item)
                tokens = [token for each in ahead if (token := each.popleft()) is not None]
                if len(tokens) < len(tasks):
                    raise EngineError("vLLM ended an answer early")
                record = await replica.record(group, self.position)
                if len({token.token for token in tokens}) > 1:
                    raise EngineError("members answered with different tokens")
                joined = self._joined(tokens, record)
                self.position += 1
                self._items.put_nowait(joined)
                if joined.finish is not None:
                    return None
        except EngineError as error:
            if self.position or len(tasks) == 1 or request.mixture == "token" or not replica.is_up:
                raise
            return f"{error} (vLLM's log may say more)"
        finally:
            replica.release(group)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, why: str) -> None:
        """Let one member answer, drawn by its weight, and all rescore what it said."""
        request, replica = self.request, self._replica
        # Rescoring reads prompt and answer and writes one token more, for which there has to be room.
        most = min(request.max_new_tokens, replica.facts["positions"] - len(request.prompt) - 1)
        if most < 1:
            raise EngineError(f"{why}; and the prompt leaves no room to rescore the answer of one")
        logger.warning("group %s: one member answers alone: %s", self._group, why)
        draw = random.Random(f"{self._body['seed']} member")  # not vLLM's numbers, which draw the tokens
        member = draw.choices(range(len(self._models)), self._weights)[0]
        body = {**self._body, "model": self._models[member], "max_tokens": most}
        alone = Membership(f"{self._group}-alone", 0, (1.0,))
        async with replica.capacity.room_for(1):
            answer = [told.token async for told in replica.tokens(alone, body)]
        is_ended = bool(answer) and answer[-1] in request.end_tokens
        if not is_ended and len(answer) < most:
            raise EngineError("vLLM ended an answer early")
        tokens = await self._rescored([*request.prompt, *answer], len(request.prompt))
        self.sampled = Sampled(member, why)
        for token in [*tokens[:-1], tokens[-1]._replace(finish="stop" if is_ended else "length")]:
            self.position += 1
            self._items.put_nowait(token)

    async def _rescored(self, text: Sequence[int], start: int = 1) -> list[EngineToken]:
        """What the mixture makes of the tokens of a text from `start` on; its weights begin there at π."""
        replica, request = self._replica, self.request

        async def named(model: str) -> list[dict[int, float]]:
            async with replica.capacity.room_for(1):
                return (await replica.prompt_log_probs(model, text, self._likeliest))[start - 1 :]

        return rescored(
            await _all_of([named(model) for model in self._models]),
            text[start:],
            self._weights,
            request.mixture == "token",
            request.alternatives,
            request.members,
        )

    def _joined(self, tokens: Sequence[MemberToken], record: Any) -> EngineToken:
        request, token = self.request, tokens[0].token
        log_probs = [each.log_prob for each in tokens]
        joint = torch.tensor(record.weights, dtype=torch.float64).log() + torch.tensor(log_probs, dtype=torch.float64)
        is_last = self.position + 1 == request.max_new_tokens
        return EngineToken(
            token=token,
            log_prob=float(joint.logsumexp(0)),
            weights=record.weights,
            member_log_probs=log_probs,
            total=record.total,
            aleatoric=record.aleatoric,
            epistemic=record.epistemic,
            variation_ratio=record.variation_ratio,
            alternatives=[Alternative(*each) for each in record.alternatives],
            member_alternatives=[[Alternative(*each) for each in member] for member in record.member_alternatives],
            finish="stop" if token in request.end_tokens else "length" if is_last else None,
        )


async def _all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of works that run together. The first error ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            begun = [tasks.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in begun]


async def _read(
    replica: Replica, membership: Membership, body: dict[str, Any], found: "asyncio.Queue[tuple[int, Any]]"
) -> None:
    """Put the tokens of one member's request into a queue; at the end None, or the error that ended it."""
    try:
        async for token in replica.tokens(membership, body):
            found.put_nowait((membership.member, token))
        found.put_nowait((membership.member, None))
    except Exception as error:
        found.put_nowait((membership.member, error))


def _body(request: EngineRequest, of_base: Mapping[str, Any]) -> dict[str, Any]:
    """The body of vLLM's completion for a request. Settings mean what they mean for `LoraEnsemble.generate`."""
    given = {name: value for name, value in request.settings.items() if value is not None}
    merged = {**_DEFAULTS, **of_base, **given}
    is_sampling = given.get("do_sample", any(name in given for name in _SAMPLING) or of_base.get("do_sample", False))
    if given.get("temperature") == 0:
        is_sampling = False
    elif given.get("do_sample") is False and given.get("temperature", 1) != 1:
        raise ConfigError(
            f"is False, but a temperature of {given['temperature']:g} needs sampling",
            where="do_sample",
            hint="Leave one of the two out.",
        )
    seed = request.seed
    if seed is None:
        seed = secrets.randbits(62) if is_sampling else 0  # so a greedy answer is the same again
    sampling = (
        {name: merged[name] for name in _SAMPLING} if is_sampling else {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    )
    return {
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": list(request.end_tokens),
        "ignore_eos": True,  # the end tokens say where an answer ends
        "skip_special_tokens": False,
        "seed": seed,
        "repetition_penalty": merged["repetition_penalty"],
        **sampling,
    }


def _generation_config(base: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
