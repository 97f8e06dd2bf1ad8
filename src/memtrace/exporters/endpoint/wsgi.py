"""A small WSGI server for a guest in somebody else's process: no client can hold it up, and it leaves no trace.

What the standard library's server lacks for that: a deadline for the whole connection and not only for each read, a
bound on threads, a TLS handshake outside the accepting thread, error pages and logs that tell nothing, and forked
children that do not keep the port.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

logger = logging.getLogger("memtrace")

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

IDLE_SECONDS = 5.0
"""How long a client may take for one read or write, those of the TLS handshake included."""
DEADLINE_SECONDS = 15.0
"""How long a connection may last altogether."""
MAX_CONNECTIONS = 16
"""Connections served at once. One more cuts off the oldest: a scrape takes milliseconds, so that one is stuck."""
POLL_SECONDS = 0.1
"""How often the accepting thread looks for overdue connections while it has some."""
REST_SECONDS = 1.0
"""How often it looks for the end while it has none: where the end does not wake it."""


class Connection(NamedTuple):
    """A connection that is being served."""

    socket: socket.socket
    since: float
    """When it was accepted, on the monotonic clock."""

    def cut_off(self) -> None:
        """Ends both directions, which wakes the thread that serves it."""
        # Not SSLSocket.shutdown: it would take the TLS state away from under that thread.
        with suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class Exchange(ServerHandler):
    """One request and its response."""

    server_software = "memtrace"

    def log_exception(self, exc_info: Any) -> None:
        """Logs what the application raised; the client gets the standard page, which tells nothing."""
        log = logger.debug if isinstance(exc_info[1], OSError) else logger.error
        log("memtrace: a request to the metrics endpoint failed", exc_info=exc_info)


class RequestHandler(WSGIRequestHandler):
    """Reads the one request of a connection."""

    timeout = IDLE_SECONDS
    server: BoundedServer
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def handle(self) -> None:
        """Reads and answers the request."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            return
        exchange = Exchange(self.rfile, self.wfile, sys.stderr, self.get_environ())  # type: ignore[arg-type]
        exchange.request_handler = self  # type: ignore[attr-defined]  # close() of the base class wants it
        exchange.run(self.server.app)

    def version_string(self) -> str:
        """Names no versions."""
        return "memtrace"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Sends the status alone: the standard text repeats what the client sent."""
        super().send_error(code)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps requests out of the training log."""


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Serves each connection on a thread of its own, within bounds of time and number.

    It listens once it is made and serves once it is started. Its life ends in one of three ways: `close()`, which waits
    for its threads; `end()`, which waits for nothing and may run within the garbage collector, on any thread; and, in a
    forked child, with the fork.

    Args:
        host: name or IP address to listen on.
        port: port to listen on; 0 takes any free one.
        app: answers the requests.
        tls: context with a certificate; None serves plain HTTP.

    Raises:
        OSError: the address cannot be used.
    """

    request_queue_size = 4 * MAX_CONNECTIONS  # with the usual 5, a client that comes sixth waits a second

    def __init__(self, host: str, port: int, app: WsgiApp, tls: ssl.SSLContext | None = None) -> None:
        self.app = app
        self._tls = tls
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._serving: dict[threading.Thread, Connection] = {}
        self._thread: threading.Thread | None = None
        self._ending = False
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), RequestHandler)
        _SERVERS.add(self)

    @property
    def timeout(self) -> float:  # type: ignore[override]
        """How long the accepting thread waits for a connection, in seconds: each look takes time from the training."""
        return POLL_SECONDS if self._serving else REST_SECONDS

    def start(self) -> None:
        """Serves from a thread of its own from now on."""
        self._thread = threading.Thread(target=self._accept_until_the_end, name="memtrace-metrics", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Gives the port back and tells all threads to end, without waiting for them.

        It takes no lock and blocks nowhere, so that a finalizer may call it: the garbage collector runs on any thread,
        the server's own included, between any two instructions.
        """
        self._ending = True
        with suppress(OSError):  # wakes the accepting thread; without it the port stays taken until that looks again
            self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()
        for connection in self._serving.copy().values():
            connection.cut_off()

    def close(self) -> None:
        """Stops serving, gives the port back and joins all threads but the caller's. Closing twice does nothing."""
        accepting, self._thread = self._thread, None
        self.end()
        for thread in (accepting, *self._serving.copy()):
            if thread is not None and thread is not threading.current_thread():
                thread.join(IDLE_SECONDS)

    def abandon(self) -> None:
        """Closes this process's copies of all sockets, in a forked child: the parent's connections go on."""
        self._thread, self._ending = None, True
        for inherited in (self.socket, *(connection.socket for connection in self._serving.copy().values())):
            with suppress(OSError):
                os.close(inherited.detach())
        self._serving.clear()

    def _accept_until_the_end(self) -> None:
        while not self._ending:
            try:
                self.handle_request()
            except ValueError:  # the end came just before the wait for a connection: the socket is closed
                if not self._ending:
                    raise
            self.service_actions()
        for connection in self._serving.copy().values():  # one that was accepted while the end came
            connection.cut_off()

    def server_bind(self) -> None:
        """Binds without asking a name server for this machine's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "memtrace", self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection. The TLS handshake is left to the thread that will serve it."""
        connection, address = self.socket.accept()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives the connection a thread; when all are busy, the oldest connection makes room."""
        if not self._slots.acquire(blocking=False):
            oldest = min(self._serving.copy().values(), key=lambda connection: connection.since, default=None)
            if oldest is not None:
                oldest.cut_off()
            if not self._slots.acquire(timeout=IDLE_SECONDS):
                self.shutdown_request(request)
                return
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="memtrace-scrape", daemon=True
        )
        self._serving[thread] = Connection(request, time.monotonic())
        try:
            thread.start()
        except RuntimeError:  # the process may have no more threads
            self._finished(thread)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._finished(threading.current_thread())

    def _finished(self, thread: threading.Thread) -> None:
        self._serving.pop(thread, None)
        self._slots.release()

    def service_actions(self) -> None:
        """Cuts off connections that have lasted too long, however busy they look."""
        overdue = time.monotonic() - DEADLINE_SECONDS
        for connection in self._serving.copy().values():
            if connection.since < overdue:
                connection.cut_off()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Notes a client that went away, was too slow or spoke something else than HTTP."""
        logger.debug("memtrace: a connection to the metrics endpoint was dropped", exc_info=True)


_SERVERS: weakref.WeakSet[BoundedServer] = weakref.WeakSet()


def _abandon_all() -> None:
    for server in list(_SERVERS):
        server.abandon()


# A forked DataLoader worker must not keep the port open after the trainer has died. Registered once: the hook cannot
# be taken off again, and one for each server would keep them all alive.
os.register_at_fork(after_in_child=_abandon_all)
