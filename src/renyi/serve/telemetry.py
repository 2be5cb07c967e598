"""What is counted and logged of requests: never a prompt, an answer or a key.

Metrics are Prometheus's, in a registry of their own. The log has a JSON object a request. Read next: `gate.py`, which
calls both.
"""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from renyi.serve.engine import Engine

logger = logging.getLogger("renyi.serve.requests")

_QUIET = ("/health/", "/metrics")  # what is asked every few seconds is not logged
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Telemetry:
    """The counters of one server.

    Args:
        engine: whose load is shown.
        routes: paths that are counted by name; all others are counted as "other", so that names stay few.
    """

    def __init__(self, engine: Engine, routes: tuple[str, ...]):
        self._routes = routes
        self._registry = CollectorRegistry()
        own = self._registry
        self._requests = Counter("renyi_requests", "Requests by route and status", ["route", "status"], registry=own)
        self._seconds = Histogram(
            "renyi_request_seconds", "Time of a request", ["route"], buckets=_SECONDS, registry=own
        )
        self._first = Histogram("renyi_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=own)
        self._prompt_tokens = Counter("renyi_prompt_tokens", "Tokens of prompts", registry=own)
        self._completion_tokens = Counter("renyi_completion_tokens", "Tokens of answers", registry=own)
        self._finished = Counter("renyi_answers", "Answers by how they ended", ["finish"], registry=own)
        for name, about in (
            ("running", "Requests that the engine answers now"),
            ("waiting", "Requests that wait"),
            ("cached_tokens", "Tokens in KV caches"),
        ):
            gauge = Gauge(f"renyi_{name}", about, registry=own)
            gauge.set_function(lambda name=name: getattr(engine.load(), name))  # type: ignore[misc]

    def page(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def tokens(self, prompt: int, completion: int, finished: list[str]) -> None:
        """Count the tokens of a request that has ended, and how its answers ended."""
        self._prompt_tokens.inc(prompt)
        self._completion_tokens.inc(completion)
        for finish in finished:
            self._finished.labels(finish).inc()

    def request(self, path: str, status: int, seconds: float, logged: Mapping[str, Any]) -> None:
        """Count and log a request that has ended.

        Args:
            path: of its URL.
            status: of the response; 499 if the client had gone.
            seconds: that it took.
            logged: what else the log says of it.
        """
        route = path if path in self._routes else "other"
        if path.startswith("/v1/models/"):
            route = "/v1/models/"
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if status == 200 and route.startswith(_QUIET):
            return
        line = {"time": round(time.time(), 3), "route": route, "status": status, "seconds": round(seconds, 4), **logged}
        logger.info("%s", json.dumps(line))
