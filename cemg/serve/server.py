"""The HTTP server: it listens before the run is loaded, and drains after SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cemg.errors import UserError
from cemg.serve.service import Service

KEEP_ALIVE = 75  # seconds; proxies and clients, which keep connections for up to a minute, close them first
ARRIVAL = 30  # seconds in which a request must arrive whole, also the first one of a connection
MAX_HEADERS = 65_536  # bytes
CLOSING = 1  # seconds of the shutdown that are left for connections whose request does not end


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. It accepts connections once a server uses it.

    Raises:
        UserError: The port is in use or reserved, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is not a valid address", cause=error.strerror) from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        return bound
    except OSError as error:
        bound.close()
        cause = os.strerror(error.errno or 0)
        if error.errno == errno.EADDRINUSE:
            fix = f"stop the process that listens there, or use another port: --port {port % 65535 + 1}"
        elif error.errno == errno.EACCES:
            fix = "use a port above 1023: --port 8000"
        else:
            fix = "use an address of this machine: --host 127.0.0.1"
        raise UserError(f"cannot listen on {host}, port {port}", cause=cause, fix=fix) from error


class Protocol(HttpToolsProtocol):
    """Closes a connection whose headers are too large, or whose request does not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._headers, self._in_headers = 0, True  # bytes of them so far
        self._deadline = self.loop.call_later(ARRIVAL, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came. Headers that do not end are parsed again with each part of them."""
        self._headers += len(data)
        super().data_received(data)
        if self._in_headers and self._headers > MAX_HEADERS and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of the request."""
        super().on_message_begin()
        self._deadline.cancel()
        self._deadline = self.loop.call_later(ARRIVAL, self.transport.close)

    def on_headers_complete(self) -> None:
        """Answer the request."""
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is complete; the next one has `timeout_keep_alive`."""
        self._deadline.cancel()
        self._headers, self._in_headers = 0, True
        super().on_message_complete()


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or Ctrl-C, which end it in two steps.

    First it drains: it still listens, so that health checks see it, and answers the requests that it has.
    When there is none, or the time is over, it closes its connections. A second signal ends it at once.

    Args:
        app: The application of the service.
        service: The service.
        shutdown_timeout: Seconds from the signal to the end.
    """

    def __init__(self, app: FastAPI, service: Service, *, shutdown_timeout: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False,
                timeout_graceful_shutdown=CLOSING, timeout_keep_alive=KEEP_ALIVE, http=Protocol,
            )
        )  # fmt: skip
        self.service, self.shutdown_timeout = service, shutdown_timeout
        self._last = float("inf")  # time at which draining ends

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at the second signal."""
        if self.service.status.draining:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._last = time.monotonic() + max(0.0, self.shutdown_timeout - CLOSING)
        self.service.drain(self.shutdown_timeout)

    async def on_tick(self, counter: int) -> bool:
        """End once no request is left."""
        status = self.service.status
        if status.draining and (not status.requests or time.monotonic() > self._last):
            self.should_exit = True
        return await super().on_tick(counter)
