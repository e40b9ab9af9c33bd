"""The gate in front of all routes: token, size, time and concurrency limits, headers, metrics, one log line a request."""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from lipnext.serving.limits import Limits, Refusal, Shed
from lipnext.serving.logs import event
from lipnext.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ENDPOINTS = ("/v1/predict", "/v1/attack", "/v1/model", "/healthz", "/metrics", "/openapi.json", "/")
GUARDED = ("/v1/predict", "/v1/attack", "/v1/model", "/metrics")
HEADERS = {
    # The page needs nothing from elsewhere and no inline script or style.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class State:
    """Whether the server is stopping; shared between the gate, the health check and the signal handler."""

    stopping = False


class Gate:
    """ASGI middleware.

    Args:
        app: the routes.
        limits: for every request.
        metrics: counted here: requests, times, refusals for lack of room.
        state: while it is stopping, every answer closes its connection.
        token: needed as `Authorization: Bearer TOKEN` for everything under /v1 and for /metrics; None needs none.
    """

    def __init__(
        self, app: App, *, limits: Limits, metrics: Metrics, state: State, token: str | None
    ) -> None:
        self.app, self.limits, self.metrics, self.state = app, limits, metrics, state
        self._token = None if token is None else _digest(token.encode())
        self._busy = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self.limits.body_bytes, self.state)
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                await self._admit(scope, exchange)
        except ClientDisconnect:
            exchange.status = 499  # the log's word for it; nobody is there to read an answer
        except TimeoutError:
            status, what = (503, "evaluated") if exchange.read else (408, "received")
            await exchange.refuse(
                status, f"the request was not {what} within {self.limits.request_seconds:g} s"
            )
        except Refusal as refusal:
            if isinstance(refusal, Shed):
                self.metrics.shed.labels(refusal.reason).inc()
            await exchange.refuse(refusal.status, str(refusal))
        except Exception as error:
            event("error", logging.ERROR, error=error, request=exchange.id)
            await exchange.refuse(500, f"internal error, request {exchange.id}; the server's log says more")
        finally:
            seconds = time.perf_counter() - begun
            endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
            self.metrics.requests.labels(endpoint, exchange.status).inc()
            self.metrics.seconds.labels(endpoint).observe(seconds)
            event(
                "request",
                request=exchange.id,
                method=scope["method"][:16],
                endpoint=endpoint,
                status=exchange.status,
                seconds=round(seconds, 4),
                bytes=exchange.received,
                client=scope["client"][0] if scope.get("client") else None,
            )

    async def _admit(self, scope: Message, exchange: "_Exchange") -> None:
        headers = Headers(scope=scope)
        if scope["path"] in GUARDED and not self._allows(headers.get("authorization", "")):
            raise Refusal(401, "a token is needed: send the header Authorization: Bearer TOKEN")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            raise exchange.too_long()
        if scope["method"] != "POST":
            await self.app(scope, exchange.receive, exchange.send)
            return
        if self._busy >= self.limits.requests:
            raise Shed("requests", f"{self._busy} requests are being answered already")
        self._busy += 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self._busy -= 1

    def _allows(self, authorization: str) -> bool:
        if self._token is None:
            return True
        scheme, _, given = authorization.partition(" ")
        # Digests have one length, so that not even that of the token shows in the time this takes.
        return (
            hmac.compare_digest(_digest(given.strip().encode()), self._token) and scheme.lower() == "bearer"
        )


class _Exchange:
    """One request and its answer: counts what comes in, marks what goes out."""

    def __init__(self, receive: Receive, send: Send, body_bytes: int, state: State) -> None:
        self._receive, self._send, self._most, self._state = receive, send, body_bytes, state
        self.id = secrets.token_hex(6)
        self.received, self.read = 0, False
        self.status = 500
        self._started = False

    def too_long(self) -> Refusal:
        return Refusal(413, f"a request may have {self._most:,} bytes; send fewer or smaller images")

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self.received > self._most:
            raise self.too_long()
        self.read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._started = message["status"], True
            extra = HEADERS | ({"connection": "close"} if self._state.stopping else {})
            known = {name.lower() for name, _ in message["headers"]}
            added = [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in known]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)

    async def refuse(self, status: int, message: str) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._started:
            return
        body = json.dumps({"error": message}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status == 429:
            headers.append((b"retry-after", b"1"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
