"""The routes: OpenAI's API, `/v1/score`, health, metrics, and the playground. Read next: `answers.py`, what they do.

A client that goes is noticed at once, also before the first token and where nothing is streamed: its work ends.
"""

import asyncio
import difflib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from renyi import __version__
from renyi.errors import BusyError, ConfigError, DataError, EngineError, RenyiError
from renyi.serve.answers import Answers, Task, TimeLimitError, TooLongError, UnknownModelError
from renyi.serve.gate import Gate, GateSettings, error_body
from renyi.serve.schemas import ChatBody, CompletionBody, ScoreBody
from renyi.serve.telemetry import Telemetry

logger = logging.getLogger(__name__)

ROUTES = (
    "/",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/",
    "/v1/score",
)
_KEEP_ALIVE = 15.0  # seconds without a token, after which a stream sends a comment, so that no proxy ends it
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
# Fields that an unknown one in a body may have been meant for.
_FIELDS = sorted({name for body in (ChatBody, CompletionBody, ScoreBody) for name in body.model_fields})


def create_app(answers: Answers, gate: GateSettings | None = None, log_text: bool = False) -> FastAPI:
    """The server as an ASGI application. It starts the engine, and stops it at the end.

    Args:
        answers: what answers.
        gate: whom to let in.
        log_text: whether the log has prompts' and answers' text, too.
    """
    telemetry = Telemetry(answers.engine, ROUTES)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await answers.engine.start()
        try:
            yield
        finally:
            await answers.engine.stop()

    app = FastAPI(title="renyi", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, settings=gate or GateSettings(), telemetry=telemetry)
    _handle_errors(app)
    page = (files("renyi.serve") / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"description": "The engine does not take requests."}})
    async def ready() -> JSONResponse:
        """Whether requests would be taken."""
        is_ready = answers.engine.is_ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus's text format."""
        return Response(telemetry.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The mixture, then each member."""
        return {"object": "list", "data": [answers.described(name) for name in answers.names]}

    @app.get("/v1/models/{model:path}", responses={404: {"description": "There is no such model."}})
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        return answers.described(model)

    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": about}
        for status, about in (
            (400, "Something of the request is impossible."),
            (401, "No key, or a wrong one."),
            (404, "There is no such model."),
            (413, "The body is too large."),
            (422, "A field has the wrong type or is out of range."),
            (429, "The queue is full."),
            (503, "The engine does not take requests."),
        )
    }

    @app.post("/v1/chat/completions", responses=documented)
    async def chat(body: ChatBody, request: Request) -> Response:
        """The answer to a chat."""
        return await complete(await answers.chat(body), body, request)

    @app.post("/v1/completions", responses=documented)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """The continuation of text or of token ids."""
        return await complete(await answers.completion(body), body, request)

    @app.post("/v1/score", responses=documented)
    async def score(body: ScoreBody, request: Request) -> Response:
        """Log-likelihoods, responsibilities and mixture NLL of given answers."""
        request.state.logged["model"] = body.model
        return await _while_connected(request, _as_json(answers.score(body)))

    async def complete(task: Task, body: ChatBody | CompletionBody, request: Request) -> Response:
        logged, began = request.state.logged, time.monotonic()
        logged |= {"model": body.model, "stream": bool(body.stream)}
        if log_text:
            logged["body"] = body.model_dump(mode="json", exclude_unset=True)

        def first_token() -> None:
            logged["first_token_seconds"] = round(time.monotonic() - began, 4)
            telemetry.first_token(time.monotonic() - began)

        def ended(text: list[str]) -> None:
            used = task.used
            logged.update(
                prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens, finish=task.finished
            )
            if task.sampled:
                logged["sampled"] = task.sampled
            telemetry.tokens(*used, task.finished)
            if log_text:
                logged["text"] = text

        task.on_first_token = first_token
        if body.stream:
            return _EventStream(task.chunks(task.begin()), ended)

        async def whole() -> Response:
            texts: list[str] = []
            try:
                response = await task.response()
                texts = [_text(choice) for choice in response["choices"]]
                return JSONResponse(response)
            finally:
                ended(texts)

        return await _while_connected(request, whole())

    app.openapi()  # made now, so that no request waits for it
    return app


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or choice.get("message", choice.get("delta", {})).get("content") or ""


async def _as_json(found: Awaitable[dict[str, Any]]) -> Response:
    return JSONResponse(await found)


# ---- Clients that go -------------------------------------------------------------------------------------------------


async def _while_connected(request: Request, work: Any) -> Response:
    """The response that `work` makes; if the client goes before, the work is cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        request.state.logged["client_gone"] = True
        return Response(status_code=204)
    finally:
        await _ended(working, watching)


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(Response):
    """Server-sent events: a `data:` line for each chunk, then `[DONE]`; an error ends the stream without it."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any]], ended: Callable[[list[str]], None]):
        super().__init__(media_type="text/event-stream")
        self._chunks, self._when_ended = chunks, ended
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # nginx would wait for more
        self._texts: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            else:
                scope["state"]["logged"]["client_gone"] = True
        finally:
            await _ended(writing, watching)
            await self._chunks.aclose()
            self._when_ended(["".join(self._texts)])

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def line(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        last = "data: [DONE]\n\n"
        async with aclosing(self._chunks) as chunks:
            try:
                coming = asyncio.ensure_future(anext(chunks, None))
                try:
                    while True:
                        await asyncio.wait({coming}, timeout=_KEEP_ALIVE)
                        if not coming.done():
                            await line(": waiting\n\n")
                            continue
                        chunk = coming.result()
                        if chunk is None:
                            break
                        self._texts += [_text(choice) for choice in chunk["choices"][:1]]
                        await line(f"data: {json.dumps(chunk)}\n\n")
                        coming = asyncio.ensure_future(anext(chunks, None))
                finally:
                    await _ended(coming)
            except Exception as error:
                _, body, _ = _described(error)
                last = f"event: error\ndata: {json.dumps(body)}\n\n"
        await line(last, more=False)


# ---- Errors ----------------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    async def any_error(request: Request, error: Exception) -> JSONResponse:
        status, body, headers = _described(error)
        return JSONResponse(body, status, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(*_invalid(error))

    for kind in (RenyiError, HTTPException):
        app.add_exception_handler(kind, any_error)
    app.add_exception_handler(RequestValidationError, invalid)


def _described(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
    if isinstance(error, HTTPException):
        return (
            error.status_code,
            error_body(str(error.detail), "invalid_request_error", None, None),
            dict(error.headers or {}),
        )
    if not isinstance(error, RenyiError):
        logger.error("a request failed", exc_info=error)
        return 500, error_body("The server failed on this request.", "server_error", None, None), {}
    message = f"{error}"
    for kind, status, name, code, headers in _KINDS:
        if isinstance(error, kind):
            return status, error_body(message, name, error.where, code), headers
    return 500, error_body(message, "server_error", None, None), {}


_WRONG = "invalid_request_error"
_KINDS: tuple[tuple[type[RenyiError], int, str, str | None, dict[str, str]], ...] = (
    (UnknownModelError, 404, _WRONG, "model_not_found", {}),
    (TooLongError, 400, _WRONG, "context_length_exceeded", {}),
    (TimeLimitError, 504, "server_error", "time_limit", {"x-should-retry": "false"}),
    (BusyError, 429, "rate_limit_error", "queue_full", {"retry-after": "1"}),
    (ConfigError, 400, _WRONG, None, {}),
    (DataError, 400, _WRONG, None, {}),
    (EngineError, 503, "server_error", "engine", {"retry-after": "1"}),
)


def _invalid(error: RequestValidationError) -> tuple[dict[str, Any], int]:
    """Body and status for a body that does not fit: 422, but 400 for what is no JSON, unknown or not supported."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"][1:]) or None
    message, status = found["msg"], 422
    own = found.get("ctx", {}).get("error")
    if found["type"] == "json_invalid":
        message, where, status = f"The body is no JSON ({found.get('ctx', {}).get('error', message)}).", None, 400
    elif found["type"] == "extra_forbidden":
        field = str(found["loc"][-1])
        near = difflib.get_close_matches(field, _FIELDS, n=1)
        message, status = f"There is no field {field!r}." + (f" Did you mean {near[0]}?" if near else ""), 400
    elif isinstance(own, RenyiError):
        return error_body(str(own), _WRONG, own.where, None), 400
    return error_body(f"{where}: {message}" if where else message, _WRONG, where, None), status
