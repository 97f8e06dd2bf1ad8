"""The server as a guest: no client holds it up, and nothing of it is left behind, not in a forked child either."""

from __future__ import annotations

import errno
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from memtrace.exporters.endpoint import wsgi
from memtrace.exporters.endpoint.wsgi import BoundedServer, RequestHandler

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def hello(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


@pytest.fixture
def server() -> Iterator[BoundedServer]:
    """A server that answers `hello`; no thread may be left of it."""
    before = set(threading.enumerate())
    server = BoundedServer("127.0.0.1", 0, hello)
    server.start()
    yield server
    server.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """Closes the sockets of a test."""
    with ExitStack() as stack:
        yield stack


def connect(server: BoundedServer, clients: ExitStack) -> socket.socket:
    return clients.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=60))


def rest(client: socket.socket) -> bytes:
    """Returns what the server still sends; empty where it cuts the connection off."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def scrape(server: BoundedServer) -> bytes:
    with ExitStack() as clients:
        client = connect(server, clients)
        client.sendall(SCRAPE)
        return rest(client)


def test_idle_clients_block_nobody(server: BoundedServer, clients: ExitStack) -> None:
    """With every place taken by a client that says nothing, a scrape is answered: the oldest one makes room."""
    idle = [connect(server, clients) for _ in range(wsgi.MAX_CONNECTIONS)]
    assert scrape(server).endswith(b"hello")
    assert rest(idle[0]) == b""


def test_threads_are_bounded(server: BoundedServer, clients: ExitStack) -> None:
    """Three times as many idle clients as there are places make no more threads than places."""
    before = threading.active_count()
    for _ in range(3 * wsgi.MAX_CONNECTIONS):
        connect(server, clients)
    assert scrape(server).endswith(b"hello")
    assert threading.active_count() - before <= wsgi.MAX_CONNECTIONS


def test_many_scrapers_at_once(server: BoundedServer) -> None:
    """As many scrapers as there are places are all answered, again and again."""
    with ThreadPoolExecutor(wsgi.MAX_CONNECTIONS) as pool:
        answers = list(pool.map(lambda _: scrape(server), range(200)))
    assert all(answer.endswith(b"hello") for answer in answers)


def test_a_silent_client_is_dropped(server: BoundedServer, clients: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says nothing for the time of one read is cut off."""
    monkeypatch.setattr(RequestHandler, "timeout", 0.05)
    assert rest(connect(server, clients)) == b""


def test_a_client_that_drips_is_dropped(
    server: BoundedServer, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends a byte from time to time, each read in time, is cut off at the deadline of the connection."""
    monkeypatch.setattr(wsgi, "DEADLINE_SECONDS", 0.2)
    client = connect(server, clients)
    with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
        while True:
            client.sendall(b"x")
            time.sleep(0.01)


def test_a_client_that_never_reads_keeps_nobody(clients: ExitStack) -> None:
    """A server closes at once although a client does not take its answer, however long that is."""

    def endless(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        while True:
            yield b"x" * 65536

    server = BoundedServer("127.0.0.1", 0, endless)
    server.start()
    client = connect(server, clients)
    client.sendall(SCRAPE)
    assert client.recv(1) == b"H"
    server.close()
    assert not any(thread.name.startswith("memtrace") for thread in threading.enumerate())


def test_an_idle_tls_client_blocks_nobody(clients: ExitStack, tmp_path: Any) -> None:
    """The handshake of one client is not waited for by another one's."""
    pem = tmp_path / "both.pem"
    kind = ["-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    out = ["-subj", "/CN=memtrace", "-out", str(pem), "-keyout", str(pem) + ".key"]
    subprocess.run(["openssl", "req", *kind, *out], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, str(pem) + ".key")
    trusting = ssl.create_default_context(cafile=str(pem))
    trusting.check_hostname = False
    server = BoundedServer("127.0.0.1", 0, hello, context)
    server.start()
    try:
        connect(server, clients)
        with trusting.wrap_socket(connect(server, clients)) as client:
            client.sendall(SCRAPE)
            assert rest(client).endswith(b"hello")
    finally:
        server.close()


@pytest.mark.parametrize("finish", [BoundedServer.end, BoundedServer.close], ids=["end", "close"])
@pytest.mark.parametrize("where", ["accepting thread", "serving thread"])
def test_the_end_may_come_on_its_own_threads(where: str, finish: Callable[[BoundedServer], None]) -> None:
    """The garbage collector may drop the server on any thread: none waits for itself, and the port is free."""

    class Ending(BoundedServer):
        def service_actions(self) -> None:
            if where == "accepting thread":
                finish(self)

    def ending(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        finish(server)
        return hello(environ, start_response)

    server = Ending("127.0.0.1", 0, ending)
    port = server.server_port
    server.start()
    if where == "serving thread":
        scrape(server)
    for thread in threading.enumerate():
        if thread.name.startswith("memtrace"):
            thread.join()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_end_waits_for_nobody(server: BoundedServer, clients: ExitStack) -> None:
    """Threads and clients of a server that is dropped are told to end, and the port is free at once."""
    client = connect(server, clients)
    port = server.server_port
    server.end()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert rest(client) == b""


def test_a_port_is_not_shared(server: BoundedServer) -> None:
    """A second server on the same port is an error and not a second listener."""
    with pytest.raises(OSError, match="Address already in use") as caught:
        BoundedServer("127.0.0.1", server.server_port, hello)
    assert caught.value.errno == errno.EADDRINUSE


def test_requests_are_not_logged(server: BoundedServer, capfd: pytest.CaptureFixture[str]) -> None:
    """The training log has no line about scrapes, nor about clients that speak something else."""
    scrape(server)
    with ExitStack() as clients:
        client = connect(server, clients)
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n")
        rest(client)
    assert capfd.readouterr() == ("", "")


def run(script: str) -> subprocess.Popen[str]:
    """Starts a program that serves `hello` as `server`, in a process of its own.

    Its port lies below those that the system gives away, so that nobody else takes it once it is free.
    """
    preamble = """
        import os, sys, time
        from memtrace.exporters.endpoint.wsgi import BoundedServer
        def hello(environ, start_response):
            start_response("200 OK", [])
            return [b"hello"]
        server = None
        for port in range(20_000 + os.getpid() % 10_000, 32_000):
            try:
                server = BoundedServer("127.0.0.1", port, hello)
                break
            except OSError:
                continue
        server.start()
    """
    program = textwrap.dedent(preamble) + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_forked_child_does_not_keep_the_port() -> None:
    """After SIGKILL of the process the port is free, although a child that it had forked lives on."""
    script = """
        child = os.fork()
        if child == 0:
            os.write(1, b"forked\\n")  # whole lines: two processes write here
            sys.stdin.read()
            os._exit(0)
        os.write(1, f"{server.server_port}\\n".encode())
        time.sleep(60)
    """
    with run(script) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
        (port,) = lines - {"forked"}
        with socket.create_connection(("127.0.0.1", int(port)), timeout=60) as client:
            client.sendall(SCRAPE)
            assert rest(client).endswith(b"hello"), "the parent serves after the fork"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with socket.create_server(("127.0.0.1", int(port))):
            pass
        process.stdin.close()  # ends the child


def test_closing_in_a_forked_child_ends() -> None:
    """A child may close what it inherited: it returns at once, and the parent goes on serving."""
    script = """
        child = os.fork()
        if child == 0:
            server.close()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), server.server_port, flush=True)
        sys.stdin.read()
        server.close()
    """
    with run(script) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        code, port = process.stdout.readline().split()
        assert code == "7"
        with socket.create_connection(("127.0.0.1", int(port)), timeout=60) as client:
            client.sendall(SCRAPE)
            assert rest(client).endswith(b"hello")
        process.stdin.close()
        assert process.wait() == 0


def test_a_connection_goes_on_in_the_parent_alone() -> None:
    """A child forked in the middle of a scrape neither ends the connection nor keeps it open."""
    script = """
        import socket, threading
        client = socket.create_connection(("127.0.0.1", server.server_port))
        while not server._serving:
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            sys.stdin.read()
            os._exit(0)
        client.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        print(b"".join(iter(lambda: client.recv(4096), b""))[-5:].decode(), flush=True)
        server.close()
    """
    with run(script) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "hello\n"
        process.stdin.close()
        assert process.wait() == 0


def test_an_exit_without_close_ends_the_process() -> None:
    """A script that forgets to close ends all the same: no thread of the server keeps it alive."""
    with run("print('end', flush=True)") as process:
        assert process.wait(timeout=60) == 0


def test_servers_are_not_kept_alive(server: BoundedServer) -> None:
    """A closed server is forgotten by the hook for forked children."""
    before = len(wsgi._SERVERS)
    for _ in range(3):
        BoundedServer("127.0.0.1", 0, hello).close()
    assert len(wsgi._SERVERS) <= before
