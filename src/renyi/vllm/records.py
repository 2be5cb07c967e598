"""How the uncertainty of tokens leaves vLLM, whose API has no field for it: a small HTTP server beside its own.

`GET /records?prefix=P` is a stream of JSON lines. The first holds the server's limits. Each further line is a `Record`
of a group whose name begins with P, sent before vLLM sends the token. An empty line says that the connection lives.

It knows neither vLLM nor tensors. The server's engine reads these lines; see `renyi.serve.vllm`.
"""

import hmac
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from renyi.errors import EngineError
from renyi.vllm.mixing import Record

FORMAT = 1  # of the lines; client and plugin may be of different releases
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8001
_KEPT = 100_000  # records that a reader may lag behind
_SECONDS = 5.0  # between signs of life


class _Reader:
    """Someone who reads records."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.lines: queue.Queue[list[Record]] = queue.Queue(_KEPT)
        self.is_lost = False


class Broadcaster:
    """Sends records to all who read.

    Args:
        host, port: where to listen. Port 0 takes a free one.
        api_key: readers have to send it as a bearer token; None for no key.
        facts: the first line that readers get.

    Raises:
        EngineError: it cannot listen there.
    """

    def __init__(self, host: str, port: int, api_key: str | None, facts: Mapping[str, Any]):
        self._readers: list[_Reader] = []
        self._lock = threading.Lock()
        first = (json.dumps(dict(facts)) + "\n").encode()
        broadcaster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
                if api_key and not hmac.compare_digest(given, api_key.encode()):
                    self.send_error(401)
                elif url.path != "/records":
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Type", "application/jsonl")
                    self.end_headers()
                    with broadcaster.reading(parse_qs(url.query).get("prefix", [""])[0]) as reader:
                        self._send(reader)

            def _send(self, reader: _Reader) -> None:
                data = first
                try:
                    while not reader.is_lost:
                        self.wfile.write(data)
                        self.wfile.flush()
                        try:
                            data = b"".join(_line(record) for record in reader.lines.get(timeout=_SECONDS))
                        except queue.Empty:
                            data = b"\n"
                except OSError:
                    pass  # the reader has gone

            def log_message(self, *args: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise EngineError(
                f"cannot listen ({error})",
                where=f"{host}:{port}",
                hint='Name another port: --additional-config \'{"renyi": {"port": 8002}}\'.',
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="renyi-records", daemon=True).start()

    def reading(self, prefix: str) -> "_Reading":
        return _Reading(self, _Reader(prefix))

    def tell(self, records: Sequence[Record]) -> None:
        """Send the records of a step. It never waits: a reader who lags too far behind is cut off."""
        with self._lock:
            for reader in self._readers:
                found = [record for record in records if record.group.startswith(reader.prefix)]
                if found:
                    try:
                        reader.lines.put_nowait(found)
                    except queue.Full:
                        reader.is_lost = True

    def close(self) -> None:
        """Cut all readers off."""
        with self._lock:
            for reader in self._readers:
                reader.is_lost = True
                with suppress(queue.Full):
                    reader.lines.put_nowait([])
        self._server.shutdown()
        self._server.server_close()

    def join(self, reader: _Reader) -> None:
        with self._lock:
            self._readers.append(reader)

    def leave(self, reader: _Reader) -> None:
        with self._lock:
            self._readers.remove(reader)


class _Reading:
    """A reader, from its first line to its last."""

    def __init__(self, broadcaster: Broadcaster, reader: _Reader):
        self._broadcaster, self._reader = broadcaster, reader

    def __enter__(self) -> _Reader:
        self._broadcaster.join(self._reader)
        return self._reader

    def __exit__(self, *error: object) -> None:
        self._broadcaster.leave(self._reader)


def _line(record: Record) -> bytes:
    # JSON has no infinities: Python's are read back by Python's reader, which is the only one here.
    return (json.dumps(record._asdict()) + "\n").encode()
