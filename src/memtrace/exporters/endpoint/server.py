"""The metrics endpoint: where it listens, who may read it, and what it answers."""

from __future__ import annotations

import base64
import errno
import hmac
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from prometheus_client import CollectorRegistry, make_wsgi_app

from memtrace.config import TracerConfig
from memtrace.errors import ConfigError, OutputError
from memtrace.exporters.endpoint.wsgi import BoundedServer, WsgiApp

METRICS_PATH = "/metrics"
PORT_TRIES = 64
"""How many ports are tried from the wanted one upwards: enough for every rank of a few jobs on one machine."""

_ACCEPTED_VERSION = re.compile(r"version=([^;,]*)")
_VERSION = re.compile(r"\d{1,6}(\.\d{1,6})*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Certificate chain and private key of the endpoint, PEM."""

    cert_file: Path
    key_file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The one user that may read the endpoint."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the metrics are served, and to whom."""

    address: str = "127.0.0.1"
    port: int = 0
    """First port to try; 0 takes any free one."""
    tls: TlsFiles | None = None
    """None serves plain HTTP."""
    credentials: Credentials | None = None
    """None asks nobody who they are."""

    @classmethod
    def of(cls, config: TracerConfig, local_rank: int = 0) -> Self | None:
        """Returns the endpoint of one local rank; None where the settings want none.

        Raises:
            ConfigError: the password file cannot be read.
        """
        if config.port is None:
            return None
        tls = credentials = None
        if config.tls_cert_file is not None and config.tls_key_file is not None:
            tls = TlsFiles(cert_file=Path(config.tls_cert_file), key_file=Path(config.tls_key_file))
        if config.basic_auth_user is not None:
            password = config.basic_auth_password or _read_password(config.basic_auth_password_file)
            credentials = Credentials(user=config.basic_auth_user, password=password)
        port = config.port and min(config.port + local_rank, 65535)
        return cls(address=config.address, port=port, tls=tls, credentials=credentials)


class Scrapes:
    """Counts scrapes, those that have begun and those that were answered whole."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._answered = 0
        """The last one to begin among those that were answered."""

    def begin(self) -> int:
        """Returns the number of a scrape that begins now: before its figures are read."""
        with self._changed:
            self._begun += 1
            return self._begun

    def answered(self, number: int) -> None:
        """Notes that the client of a scrape has got all of it."""
        with self._changed:
            self._answered = max(self._answered, number)
            self._changed.notify_all()

    @property
    def begun(self) -> int:
        """How many scrapes have begun."""
        return self._begun

    def wait_for_one_after(self, begun: int, seconds: float) -> bool:
        """Waits at most so long until a scrape after so many was answered; returns whether one was."""
        with self._changed:
            return self._changed.wait_for(lambda: self._answered > begun, seconds)


class _Answer(list[bytes]):
    """The body of a scrape, which notes when all of it has been written."""

    def __init__(self, body: Iterable[bytes], written: Callable[[], None]) -> None:
        super().__init__(body)
        self._written = written

    def __iter__(self) -> Iterator[bytes]:
        yield from super().__iter__()
        self._written()


class MetricsServer:
    """A running endpoint; a context manager that closes it.

    Made by `serve()`.
    """

    def __init__(self, server: BoundedServer, scheme: str, scrapes: Scrapes) -> None:
        self._server = server
        self._scheme = scheme
        self._scrapes = scrapes
        server.start()

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Address of the metrics, for people and scrape configurations."""
        host = str(self._server.server_address[0])
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{METRICS_PATH}"

    @property
    def scrapes(self) -> Scrapes:
        """Counts the scrapes."""
        return self._scrapes

    def end(self) -> None:
        """Gives the port back and tells the threads to end; waits for nothing, so that a finalizer may call it."""
        self._server.end()

    def close(self) -> None:
        """Stops serving, gives the port back and joins all threads. Closing twice does nothing."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(registry: CollectorRegistry, endpoint: Endpoint, page: Callable[[], str] | None = None) -> MetricsServer:
    """Serves a registry until the returned server is closed, and at `/` the page where there is one.

    A port in use is skipped for the next free one.

    Raises:
        ConfigError: the certificate and the key cannot be loaded.
        OutputError: the address or the port cannot be used, or none of `PORT_TRIES` ports is free.
    """
    tls = None if endpoint.tls is None else _tls_context(endpoint.tls)
    scrapes = Scrapes()
    app = metrics_app(registry, page, scrapes)
    if endpoint.credentials is not None:
        app = require(endpoint.credentials, app)
    return MetricsServer(_listen(endpoint, app, tls), "http" if tls is None else "https", scrapes)


def metrics_app(
    registry: CollectorRegistry, page: Callable[[], str] | None = None, scrapes: Scrapes | None = None
) -> WsgiApp:
    """Returns the application: GET and HEAD of `/metrics`, in the format that the client asks for, and of `/`."""
    expose: WsgiApp = make_wsgi_app(registry)
    scrapes = scrapes or Scrapes()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        shows_page = page is not None and environ["PATH_INFO"] in ("", "/")
        if environ["PATH_INFO"] != METRICS_PATH and not shows_page:
            return _page(start_response, "404 Not Found")
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return _page(start_response, "405 Method Not Allowed", ("Allow", "GET, HEAD"))
        # The client library fails on a version that is not a number, and then the plain format is right.
        if not all(map(_VERSION.fullmatch, _ACCEPTED_VERSION.findall(environ.get("HTTP_ACCEPT", "")))):
            environ = environ | {"HTTP_ACCEPT": ""}
        if shows_page:
            assert page is not None
            body = page().encode(errors="replace")
            start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body)))])
            return [body] if method == "GET" else []
        if method == "GET":
            number = scrapes.begin()
            return _Answer(expose(environ, start_response), partial(scrapes.answered, number))
        return _head(expose, environ, start_response)

    return app


def require(credentials: Credentials, app: WsgiApp) -> WsgiApp:
    """Returns the application behind HTTP basic authentication (RFC 7617)."""
    expected = base64.b64encode(f"{credentials.user}:{credentials.password}".encode())

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        # As bytes: compare_digest takes no text beyond ASCII, and the client may send any.
        if scheme.lower() == "basic" and hmac.compare_digest(token.strip().encode("latin-1"), expected):
            return app(environ, start_response)
        return _page(
            start_response, "401 Unauthorized", ("WWW-Authenticate", 'Basic realm="memtrace", charset="UTF-8"')
        )

    return guarded


def _page(start_response: Callable[..., Any], status: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{status}\n".encode()]


def _head(expose: WsgiApp, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answers as GET would, without the body."""
    answer: list[Any] = []
    body = b"".join(expose(environ | {"REQUEST_METHOD": "GET"}, lambda *status: answer.extend(status)))
    status, headers = answer
    start_response(status, [*headers, ("Content-Length", str(len(body)))])
    return []


def _listen(endpoint: Endpoint, app: WsgiApp, tls: ssl.SSLContext | None) -> BoundedServer:
    last = min(endpoint.port + PORT_TRIES - 1, 65535) if endpoint.port else 0
    for port in range(endpoint.port, last + 1):
        try:
            return BoundedServer(endpoint.address, port, app, tls)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be a host's
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                reason = getattr(error, "strerror", None) or error
                raise OutputError(
                    f"the metrics endpoint cannot listen on {endpoint.address} port {port}: {reason}; "
                    "set another address or port, or port=None for no endpoint"
                ) from error
    raise OutputError(
        f"the metrics endpoint found no free port on {endpoint.address} from {endpoint.port} to {last}; "
        "set another port, or port=0 for any free one"
    )


def _tls_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password, so that an encrypted key is an error and not a question on the terminal.
        context.load_cert_chain(files.cert_file, files.key_file, password="")
    except OSError as error:
        raise ConfigError(
            f"tls_cert_file {files.cert_file} and tls_key_file {files.key_file} must be a PEM certificate and its "
            f"unencrypted key: {error.strerror or error}"
        ) from error
    return context


def _read_password(path: str | os.PathLike[str] | None) -> str:
    assert path is not None, "TracerConfig has checked that there is a password"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"basic_auth_password_file {os.fspath(path)} cannot be read: {reason}") from error
    if not lines or not lines[0]:
        raise ConfigError(f"basic_auth_password_file {os.fspath(path)} must have the password on its first line")
    return lines[0]
