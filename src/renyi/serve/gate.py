"""What every request passes before a route sees it: its id, who it is from, how large it is; and what is logged of it.

Plain ASGI, because a route must be able to see that its client has gone. Read next: `app.py`.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from renyi.serve.telemetry import Telemetry

logger = logging.getLogger(__name__)

_CLIENT_GONE = 499  # nginx's, for the log and the metrics; nobody receives it
_MOST_DISCARDED = 16  # times the largest body; more of one that is too large is not read
_OPEN = ("/health/live", "/health/ready")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class GateSettings:
    """Whom to let in.

    Attributes:
        keys: each is accepted as a bearer token, or as the password of HTTP's basic authentication, with which a
            browser asks for it. Without any, everyone is let in.
        hosts: names by which the server may be called where there is no key: a page of another site that reaches this
            machine by a name of its own is refused. Empty for any.
        body_bytes: the largest body.
        body_seconds: how long a body may take to arrive.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: GateSettings, telemetry: Telemetry):
        self._app, self._settings, self._telemetry = app, settings, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        logged: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {})["logged"] = logged
        began, status = time.monotonic(), _CLIENT_GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused is not None:
                await _answer_error(answer, *refused)
                return
            body = await self._body(scope, headers, receive, answer)
            if body is not None:
                await self._app(scope, _again(body, receive), answer)
        except Exception:
            logger.exception("a request failed")
            if status == _CLIENT_GONE:  # nothing has been sent yet
                await _answer_error(answer, 500, "server_error", "The server failed on this request.", {})
        finally:
            status = _CLIENT_GONE if logged.pop("client_gone", False) else status
            self._telemetry.request(scope["path"], status, time.monotonic() - began, logged)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> "tuple[int, str, str, dict[str, str]] | None":
        """Status, code, message and headers for a client that is not let in; None for one that is."""
        if scope["path"] in _OPEN:
            return None
        if self._settings.keys:
            given = _key(headers.get("authorization", ""))
            known = [hmac.compare_digest(given.encode(), key.encode()) for key in self._settings.keys]
            if any(known):
                return None
            scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="renyi", charset="UTF-8"'
            what = "Incorrect API key" if given else "No API key"
            return (
                401,
                "invalid_api_key",
                f"{what}: send it as `Authorization: Bearer KEY`.",
                {"www-authenticate": scheme},
            )
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._settings.hosts and host and host not in self._settings.hosts:
            message = "This server answers to its own address only. Start it with --api_key to reach it by other names."
            return 403, "unknown_host", message, {}
        return None

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> bytes | None:
        """The whole body; None if it has been refused, or the client has gone."""
        limit = self._settings.body_bytes
        length = headers.get("content-length", "0")
        too_large = (413, "body_too_large", f"The body has more than {limit:,} bytes.", {"connection": "close"})
        parts: list[bytes] = []
        size = 0
        if length.isdecimal() and int(length) > _MOST_DISCARDED * limit:
            await _answer_error(send, *too_large)
            return None
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part, has_more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    # What is too large is read on and thrown away: a client that still writes would not see the answer.
                    parts.append(part)
                    if size > limit:
                        parts.clear()
                    if size > limit and (not has_more or size > _MOST_DISCARDED * limit):
                        await _answer_error(send, *too_large)
                        return None
                    if not has_more:
                        return b"".join(parts)
        except TimeoutError:
            message_text = f"The body did not arrive within {self._settings.body_seconds:g} s."
            await _answer_error(send, 408, "body_too_slow", message_text, {"connection": "close"})
            return None


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _key(authorization: str) -> str:
    """The key in an `Authorization` header; "" if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


async def _answer_error(send: Send, status: int, code: str, message: str, headers: dict[str, str]) -> None:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = json.dumps(error_body(message, kind, None, code)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes after it."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
