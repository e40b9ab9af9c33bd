"""`lipnext serve`: the socket, slow clients, signals, and a stop that answers what was accepted."""

import asyncio
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lipnext.core.errors import ConfigError
from lipnext.serving.app import create_app
from lipnext.serving.gate import State
from lipnext.serving.limits import Limits
from lipnext.serving.logs import configure, event
from lipnext.serving.service import open_service

TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 48\r\n"
    b'connection: close\r\n\r\n{"error": "the head of the request came slowly"}'
)


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    abstain_below: Fraction | None = None,
    ready: Callable[[str], None] = lambda url: None,
    limits: Limits | None = None,
) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C, then answer what was accepted and return.

    Args:
        folder: with the bundle.
        host: address or name to listen on.
        port: 0 takes a free one.
        token: needed for /v1 and /metrics; None needs none.
        abstain_below: no label is told unless its radius is above.
        ready: called with the address once requests are answered.
        limits: None takes the defaults.

    Raises:
        BundleError, UnsoundError: as `service.open_service`.
        ConfigError: where the address cannot be listened on or the token is not usable.
    """
    limits = limits or Limits()
    if token is not None:
        _check_token(token)
    configure()
    listener = _listen(host, port)
    with listener:
        address, number = listener.getsockname()[:2]
        service = open_service(folder, abstain_below, limits)
        if not service.bit_equal:
            event("last bits of radii depend on the batch on this machine", logging.WARNING)
        state = State()
        config = uvicorn.Config(
            create_app(service, token, state),
            http=_protocol(limits),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=round(limits.drain_seconds),
        )
        url = f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}"
        _Server(config, state, limits.lame_seconds, lambda: ready(url)).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches the address or name."""
    try:
        return all(ipaddress.ip_address(info[4][0]).is_loopback for info in _resolve(host, 0))
    except OSError:
        return False


def _check_token(token: str) -> None:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            "a token must be ASCII without spaces and not empty; make one with openssl rand -hex 16"
        )


def _resolve(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded, so that a busy port is told at once."""
    try:
        family, _, _, _, address = _resolve(host, port)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from None


class _Server(uvicorn.Server):
    """Stops in two steps: first it still answers but sends everybody away, then it closes."""

    def __init__(
        self, config: uvicorn.Config, state: State, lame_seconds: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._state, self._lame_seconds, self._ready = state, lame_seconds, ready
        self._stop_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        event("ready")
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._state.stopping:
            self._state.stopping = True
            self._stop_at = time.monotonic() + self._lame_seconds
            event("stopping", signal=signal.Signals(sig).name)
        else:  # asked twice: close now; a third Ctrl-C waits for nobody
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or time.monotonic() >= self._stop_at
        return await super().on_tick(counter)


def _protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's protocol with a deadline for the head of a request, and for a body that nobody reads any more."""

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(limits.header_seconds, self._late)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            self._deadline = None
            idle = self.cycle is None or self.cycle.response_complete
            if not idle or self.transport.is_closing():
                return
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                self.transport.write(TOO_SLOW)
            self.transport.close()

    return Protocol
