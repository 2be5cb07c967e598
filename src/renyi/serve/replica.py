"""One `vllm serve` with `renyi.vllm` in it, as a client sees it: members' tokens, scores, and records of uncertainty.

It speaks vLLM's HTTP API and the stream of `renyi.vllm.records`. Read next: `vllm.py`, the engine that uses replicas.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import httpx

from renyi.errors import ConfigError, EngineError
from renyi.vllm.groups import Membership
from renyi.vllm.mixing import Record
from renyi.vllm.records import DEFAULT_PORT, FORMAT

logger = logging.getLogger(__name__)
_SILENCE = 60.0  # seconds without a sign of life after which a replica counts as down
_RECORD_SECONDS = 60.0  # how long a token may be ahead of its record


class MemberToken(NamedTuple):
    """A token that a member's request got, and its log-probability under that member."""

    token: int
    log_prob: float


@dataclass(frozen=True)
class ReplicaAddress:
    """Where a replica is: its API, such as http://gpu-0:8000, and its records; see `address_of`."""

    api: str
    records: str


def address_of(text: str) -> ReplicaAddress:
    """Read `URL`, or `URL,RECORDS_URL`. By default records are on the same host at port 8001.

    Raises:
        ConfigError: it is no address.
    """
    urls = text.split(",")
    parts = [urlsplit(url) for url in urls]
    if len(urls) > 2 or any(part.scheme not in ("http", "https") or not part.hostname for part in parts):
        raise ConfigError(f"{text!r} is no address", where="vllm_url", hint="Write http://HOST:8000.")
    api = urls[0].rstrip("/").removesuffix("/v1")
    if len(urls) == 2:
        return ReplicaAddress(api, urls[1].rstrip("/"))
    host = f"[{parts[0].hostname}]" if ":" in str(parts[0].hostname) else parts[0].hostname
    return ReplicaAddress(api, urlunsplit((parts[0].scheme, f"{host}:{DEFAULT_PORT}", "", "", "")))


class Capacity:
    """How many requests a replica is sent at once. Those that wait begin in the order in which they came."""

    def __init__(self, most: int):
        self._free, self._waiting = most, deque[tuple[int, asyncio.Future[None]]]()

    @asynccontextmanager
    async def room_for(self, several: int) -> AsyncIterator[None]:
        """Wait until so many requests can begin together."""
        mine = several, asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        self._begin()
        try:
            await mine[1]
            yield
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
            if not mine[1].cancelled():
                self._free += several
            self._begin()

    def _begin(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            several, begins = self._waiting.popleft()
            if not begins.cancelled():
                self._free -= several
                begins.set_result(None)


class Replica:
    """A connection to one replica.

    Args:
        address: where it is.
        key: of its API; None for no key.
        prefix: with which the names of this client's groups begin.
        members: names of the members' models, which it has to serve.

    Attributes:
        is_up: whether it answers and its records come.
        facts: its limits: `rows`, `step_tokens`, `positions`, `adapters`.
        capacity: what it is sent at once: as many rows as it can run, and two groups to go on with.
        rows: requests that run or wait there for this client; whoever sends them counts them.
        why: why it is not up.
    """

    def __init__(self, address: ReplicaAddress, key: str | None, prefix: str, members: Sequence[str]):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A connection that is kept may be closed by vLLM just when the next request takes it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(60.0, read=None)
        self.address, self._prefix, self._members = address, prefix, members
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)
        self._records: dict[str, asyncio.Queue[Record | EngineError]] = {}
        self.is_up, self.rows = False, 0
        self.facts: dict[str, Any] = {}
        self.capacity = Capacity(0)
        self.why = "it was not asked yet"
        self.was_asked = asyncio.Event()

    async def run(self) -> None:
        """Read records until cancelled, and connect again whenever the connection is lost."""
        try:
            while True:
                try:
                    await self._check_models()
                    await self._read()
                    self.why = "it closed its records"
                except (httpx.HTTPError, TimeoutError, ValueError, EngineError) as error:
                    self.why = str(error) or type(error).__name__
                self._down()
                await asyncio.sleep(1.0)
        finally:
            self.is_up = False
            await self._http.aclose()

    def _down(self) -> None:
        if self.is_up:
            logger.error("%s is down: %s", self.address.api, self.why)
        self.is_up = False
        self.was_asked.set()
        for queue in self._records.values():
            queue.put_nowait(EngineError(f"the connection to vLLM was lost ({self.why})"))

    async def _check_models(self) -> None:
        async with asyncio.timeout(_SILENCE):
            response = await self._http.get(f"{self.address.api}/v1/models")
        response.raise_for_status()
        served = {model["id"] for model in response.json()["data"]}
        if missing := [name for name in self._members if name not in served]:
            raise EngineError(f"it does not serve {', '.join(missing)}")

    async def _read(self) -> None:
        url = f"{self.address.records}/records"
        async with self._http.stream("GET", url, params={"prefix": self._prefix}) as response:
            response.raise_for_status()
            lines = response.aiter_lines()
            async with asyncio.timeout(_SILENCE):
                self.facts = json.loads(await anext(lines))
            if self.facts.get("format") != FORMAT:
                raise EngineError("its renyi.vllm is of another release than this server; install the same")
            if self.facts["rows"] < len(self._members) or self.facts["adapters"] < len(self._members):
                raise EngineError(
                    f"it holds {self.facts['rows']} rows and {self.facts['adapters']} adapters, and there are "
                    f"{len(self._members)} members; raise --max-num-seqs and --max-loras"
                )
            self.capacity = Capacity(self.facts["rows"] + 2 * len(self._members))
            self.is_up = True
            self.was_asked.set()
            while True:
                async with asyncio.timeout(_SILENCE):
                    line = await anext(lines, None)
                if line is None:
                    return
                if line:
                    record = Record(**json.loads(line))
                    if record.group in self._records:
                        self._records[record.group].put_nowait(record)

    # ---- Answers -----------------------------------------------------------------------------------------------------

    def expect(self, group: str) -> None:
        """Keep the records of a group from now on."""
        self._records[group] = asyncio.Queue()

    def release(self, group: str) -> None:
        self._records.pop(group, None)

    async def record(self, group: str, position: int) -> Record:
        """The record of a group's token.

        Raises:
            EngineError: the group is broken, or there is no record.
        """
        while True:
            try:
                async with asyncio.timeout(_RECORD_SECONDS):
                    found = await self._records[group].get()
            except TimeoutError:
                raise EngineError("vLLM gave a token without its uncertainty") from None
            if isinstance(found, EngineError):
                raise found
            if found.broken is not None:
                raise EngineError(f"vLLM did not run the members together: {found.broken}")
            if found.position == position:
                return found

    async def tokens(self, membership: Membership, body: Mapping[str, Any]) -> AsyncIterator[MemberToken]:
        """The tokens of one member's request.

        Args:
            membership: its place in its group.
            body: of `POST /v1/completions`, without what this function adds.

        Raises:
            EngineError: vLLM refused the request or failed on it.
        """
        asked = {
            **body,
            "stream": True,
            "logprobs": 0,
            "return_token_ids": True,
            "vllm_xargs": membership.extra_args(),
        }
        try:
            async with self._http.stream("POST", f"{self.address.api}/v1/completions", json=asked) as response:
                if response.status_code != 200:
                    raise EngineError(_refusal(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise EngineError(f"vLLM ended the request: {chunk['error'].get('message', 'no reason given')}")
                    for choice in chunk["choices"]:
                        log_probs = (choice.get("logprobs") or {}).get("token_logprobs") or []
                        for token, log_prob in zip(choice.get("token_ids") or [], log_probs, strict=True):
                            yield MemberToken(token, log_prob)
        except httpx.HTTPError as error:
            raise EngineError(f"the connection to vLLM was lost ({str(error) or type(error).__name__})") from error

    async def prompt_log_probs(self, model: str, tokens: Sequence[int], likeliest: int = 0) -> list[dict[int, float]]:
        """What a model makes of each token but the first, given those before it.

        Args:
            model: its name.
            tokens: of the text.
            likeliest: how many of the model's likeliest tokens to name.

        Returns:
            For each token log-probabilities by token, nats: its own, and those of the likeliest.

        Raises:
            EngineError: vLLM refused the request or failed on it.
        """
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": likeliest}
        try:
            response = await self._http.post(f"{self.address.api}/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"the connection to vLLM was lost ({str(error) or type(error).__name__})") from error
        if response.status_code != 200:
            raise EngineError(_refusal(response.status_code, response.content))
        found = response.json()["choices"][0]["prompt_logprobs"]
        return [{int(token): of["logprob"] for token, of in each.items()} for each in found[1:]]


def _refusal(status: int, content: bytes) -> str:
    message = content.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        message = json.loads(content)["error"]["message"]
    return f"vLLM answered {status}: {message[:500]}"
