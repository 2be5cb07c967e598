"""Runs the server until it is told to end: which engine, who may reach it, what is logged. `renyi serve` calls it.

Read next: `app.py`, the application that runs.
"""

import asyncio
import ipaddress
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from renyi.errors import ConfigError
from renyi.inference.abstention import Abstention
from renyi.layout import member_name
from renyi.runs.load import Loaded
from renyi.serve.answers import AnswerLimits, Answers
from renyi.serve.app import create_app
from renyi.serve.batching import EngineLimits, OurEngine
from renyi.serve.engine import Engine
from renyi.serve.gate import GateSettings
from renyi.serve.vllm import VllmEngine


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, whom it lets in, and what it takes on.

    Attributes:
        host: the address to listen on.
        port: 0 takes a free one.
        keys: see `GateSettings`.
        is_open: whether to listen beyond this machine without a key.
        model: the name of the mixture; None is the folder's.
        body_bytes: the largest body.
        stop_seconds: how long answers in progress may go on when the server is told to end.
        log_text: whether the log has prompts and answers.
        answers: what one request may ask for.
        engine: what our engine takes on at once.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()
    is_open: bool = False
    model: str | None = None
    body_bytes: int = 1 << 20
    stop_seconds: int = 30
    log_text: bool = False
    answers: AnswerLimits = field(default_factory=AnswerLimits)
    engine: EngineLimits = field(default_factory=EngineLimits)

    def check(self) -> None:
        """Raise `ConfigError` for a server that would be open to others without anyone having said so."""
        if not (is_loopback(self.host) or self.keys or self.is_open):
            raise ConfigError(
                f"{self.host} can be reached from other machines, and there is no key",
                where="--host",
                hint="Give --api_key KEY (or RENYI_API_KEY in the environment), or --open to let everyone in.",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Folder(Protocol):
    """What is served: an ensemble's folder, and the threshold that it keeps. `Loaded` and `VllmEngine` are such."""

    @property
    def folder(self) -> Path: ...
    @property
    def abstention(self) -> Abstention | None: ...


def answers_of(loaded: Folder, engine: Engine, settings: ServerSettings) -> Answers:
    """What answers: an engine, with the names of its models and the folder's threshold."""
    names = [member_name(member) for member in range(engine.num_members)]
    model = settings.model or Path(loaded.folder).resolve().name or "ensemble"
    if model in names:
        raise ConfigError(f"{model!r} is a member's name", where="--model_name", hint="Give another.")
    return Answers(engine, model, names, loaded.abstention, settings.answers)


def gate_of(settings: ServerSettings) -> GateSettings:
    """Whom the server lets in."""
    is_local = is_loopback(settings.host) and not settings.keys and not settings.is_open
    hosts = ("localhost", "127.0.0.1", "[::1]", settings.host.lower()) if is_local else ()
    return GateSettings(settings.keys, hosts, settings.body_bytes)


def serve(served: Loaded | VllmEngine, settings: ServerSettings) -> None:
    """Serve an ensemble until SIGINT or SIGTERM; answers in progress may then end.

    Args:
        served: an ensemble to answer with in this process, or the engine whose members run in vLLM.
        settings: of the server.

    Raises:
        ConfigError: the settings do not fit, or the base cannot answer several requests at once.
        EngineError: no vLLM can be used.
        OSError: the address cannot be listened on.
    """
    import uvicorn

    settings.check()
    engine = OurEngine(served, settings.engine) if isinstance(served, Loaded) else served
    if isinstance(served, VllmEngine):
        asyncio.run(served.check())
    answers = answers_of(served, engine, settings)
    app = create_app(answers, gate_of(settings), settings.log_text)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.stop_seconds,
        ws="none",
    )
    log = logging.getLogger("renyi.serve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # uvicorn ends gracefully at a signal, and raises it again afterwards. Then nothing is left to end.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run()
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
        log.removeHandler(handler)
