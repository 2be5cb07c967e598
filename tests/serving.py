"""A live server for tests: a tiny ensemble in a folder, and uvicorn in a thread of this process. It asserts nothing."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from tiny import tiny_ensemble, tiny_model, tiny_tokenizer

from renyi import load
from renyi.runs.load import Loaded
from renyi.serve.answers import Answers
from renyi.serve.app import create_app
from renyi.serve.batching import OurEngine
from renyi.serve.run import ServerSettings, answers_of, gate_of


def tiny_folder(folder: Path, num_members: int = 3, tokenizer: Any = None, **base: Any) -> Loaded:
    """An ensemble of members that differ, saved with its tokenizer and its base, and loaded again."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(**base)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    ensemble = tiny_ensemble(num_members)
    ensemble.base.config._name_or_path = ensemble.base.name_or_path = str(folder / "base")
    ensemble.save(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return load(folder / "tiny", device="cpu")


class Live:
    """A server that runs.

    Attributes:
        url: of its root.
        engine: behind it.
    """

    def __init__(self, answers: Answers, settings: ServerSettings):
        self.engine, self.answers = answers.engine, answers
        self.app = create_app(answers, gate_of(settings), settings.log_text)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, timeout_graceful_shutdown=settings.stop_seconds, ws="none"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self._socket])), daemon=True)

    def start(self) -> None:
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)

    def wait_for_idle(self, seconds: float = 10.0) -> bool:
        """Whether the engine has nothing to do before so many seconds have passed."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            load = self.engine.load()
            if load.running == load.waiting == 0:
                return True
            time.sleep(0.005)
        return False


@contextmanager
def live(loaded: Loaded, **settings: Any) -> Iterator[Live]:
    """A server of an ensemble, with `ServerSettings`."""
    given = ServerSettings(**settings)
    server = Live(answers_of(loaded, OurEngine(loaded, given.engine), given), given)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def events(lines: Iterator[str]) -> list[Any]:
    """The data of server-sent events, parsed; the last is "[DONE]" if the stream ended well."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in found]
