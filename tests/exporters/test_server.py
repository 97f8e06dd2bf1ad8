"""The metrics endpoint over real sockets: what it answers, to whom, where it listens and what it leaves behind."""

from __future__ import annotations

import base64
import gzip
import http.client
import logging
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from records import gpu_snapshot

from memtrace.config import TracerConfig
from memtrace.errors import ConfigError, OutputError
from memtrace.exporters.endpoint import server as server_module
from memtrace.exporters.endpoint.server import Credentials, Endpoint, MetricsServer, TlsFiles, metrics_app, serve
from memtrace.exporters.prometheus import registry_of, render_text

SECRET = "pass:word ü"
CREDENTIALS = Credentials(user="prometheus", password=SECRET)


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    files = TlsFiles(cert_file=directory / "cert.pem", key_file=directory / "key.pem")
    subject = ["-subj", "/CN=memtrace", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    out = ["-out", str(files.cert_file), "-keyout", str(files.key_file)]
    subprocess.run(["openssl", "req", *kind, *subject, *out], check=True, capture_output=True)
    return files


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts servers that are closed after the test, when no thread of theirs may be left."""
    before = set(threading.enumerate())
    with ExitStack() as stack:
        yield lambda registry=None, **endpoint: stack.enter_context(
            serve(registry or registry_of(gpu_snapshot), Endpoint(**endpoint))
        )
    assert set(threading.enumerate()) <= before


def ask(
    server: MetricsServer,
    path: str = "/metrics",
    *,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body of an answer."""
    connection = (
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        if tls is None
        else http.client.HTTPSConnection("127.0.0.1", server.port, timeout=30, context=tls)
    )
    with closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_metrics_are_served(start: Any) -> None:
    """GET /metrics answers with the exposition of the moment, complete by its own length."""
    status, headers, body = ask(start())
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert headers["content-length"] == str(len(body))
    assert body.decode() == render_text(gpu_snapshot())


def test_prometheus_gets_the_format_it_asks_for(start: Any) -> None:
    """A client that prefers OpenMetrics and gzip gets them."""
    _, headers, body = ask(start(), Accept="application/openmetrics-text;version=1.0.0", Accept_Encoding="gzip")
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert gzip.decompress(body).endswith(b"# EOF\n")


def test_head_is_get_without_a_body(start: Any) -> None:
    """HEAD tells length and type of what GET would send."""
    server = start()
    status, headers, body = ask(server, method="HEAD")
    assert (status, body) == (200, b"")
    assert headers["content-length"] == str(len(ask(server)[2]))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_but_get_and_head(start: Any, method: str) -> None:
    """Other methods are refused, and the answer says which are not."""
    status, headers, _ = ask(start(), method=method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/secret-path", "/metrics/../etc/passwd", "/%0d%0aSet-Cookie:x"])
def test_other_paths_are_not_found(start: Any, path: str) -> None:
    """There is nothing but the metrics, and the page does not repeat what was asked for."""
    status, headers, body = ask(start(), path)
    assert (status, body) == (404, b"404 Not Found\n")
    assert not any("x" in name for name in headers if name.startswith("set-"))


def test_a_fault_is_a_500_that_tells_nothing(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What a collector raises is logged, and the page has no word of it."""

    class Broken:
        def collect(self) -> Any:
            raise RuntimeError("/home/user/secret.py")

    registry = CollectorRegistry()
    registry.register(Broken())
    with caplog.at_level(logging.ERROR):
        status, headers, body = ask(start(registry))
    assert status == 500
    assert b"secret" not in body
    assert "secret" not in str(headers)
    assert ["a request to the metrics endpoint failed" in record.message for record in caplog.records] == [True]


def test_a_request_that_is_none_is_refused(start: Any) -> None:
    """Garbage gets a 400 that does not repeat it, and no version of the server."""
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"GET /secret <script> HTTP/1.1\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.splitlines()[0] == b"HTTP/1.0 400 Bad Request"
    assert b"secret" not in answer
    assert b"Python" not in answer


def test_nobody_without_the_password(start: Any) -> None:
    """Wrong or missing credentials get a 401 that asks for them; the right ones, the metrics."""
    server = start(credentials=CREDENTIALS)
    wrong = [
        {},
        {"Authorization": ""},
        {"Authorization": "Basic"},
        {"Authorization": "Basic ü"},
        {"Authorization": "Bearer " + basic("prometheus", SECRET).split()[1]},
        {"Authorization": basic("prometheus", "password")},
        {"Authorization": basic("Prometheus", SECRET)},
        {"Authorization": basic("prometheus", SECRET + " ")},
    ]
    refused = (401, 'Basic realm="memtrace", charset="UTF-8"', b"401 Unauthorized\n")
    for headers in wrong:
        status, answer, body = ask(server, **headers)
        assert (status, answer["www-authenticate"], body) == refused
    assert ask(server, Authorization=basic("prometheus", SECRET))[0] == 200
    assert ask(server, Authorization=basic("prometheus", SECRET).replace("Basic", "basic"))[0] == 200


def test_the_password_is_asked_for_before_the_path(start: Any) -> None:
    """Who has no password cannot find out what is there."""
    assert ask(start(credentials=CREDENTIALS), "/nothing")[0] == 401


def test_no_secret_in_any_representation() -> None:
    """Neither settings nor endpoint show the password when they are printed or logged."""
    config = TracerConfig(basic_auth_user="u", basic_auth_password=SECRET)
    assert SECRET not in repr(config)
    assert SECRET not in repr(Endpoint.of(config))


def test_tls(start: Any, tls_files: TlsFiles) -> None:
    """With a certificate the endpoint speaks HTTPS, and its address says so."""
    server = start(tls=tls_files)
    trusting = ssl.create_default_context(cafile=str(tls_files.cert_file))
    assert ask(server, tls=trusting)[2].decode() == render_text(gpu_snapshot())
    assert server.url == f"https://127.0.0.1:{server.port}/metrics"


def test_tls_does_not_serve_plain_http(start: Any, tls_files: TlsFiles) -> None:
    """A client without TLS gets no metrics, and the next one with it is served."""
    server = start(tls=tls_files)
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(server)
    trusting = ssl.create_default_context(cafile=str(tls_files.cert_file))
    assert ask(server, tls=trusting)[0] == 200


@pytest.mark.parametrize("spoilt", ["missing", "garbage", "encrypted", "swapped"])
def test_a_certificate_that_cannot_be_used(tls_files: TlsFiles, tmp_path: Path, spoilt: str) -> None:
    """A missing, wrong or encrypted file is an error at once, and never a question on the terminal."""
    key = tmp_path / "key.pem"
    if spoilt == "garbage":
        key.write_text("no key")
    if spoilt == "encrypted":
        encrypt = ["openssl", "ec", "-aes256", "-passout", "pass:abcd", "-in", str(tls_files.key_file)]
        subprocess.run([*encrypt, "-out", str(key)], check=True, capture_output=True)
    if spoilt == "swapped":
        key = tls_files.cert_file
    with pytest.raises(ConfigError, match=r"cert\.pem and tls_key_file .* must be a PEM certificate and its"):
        serve(registry_of(gpu_snapshot), Endpoint(tls=TlsFiles(cert_file=tls_files.cert_file, key_file=key)))


def test_a_port_in_use_is_passed_over(start: Any) -> None:
    """Two ranks that want the same port get neighbours."""
    first = start()
    second = start(port=first.port)
    assert first.port < second.port < first.port + server_module.PORT_TRIES
    assert ask(second)[0] == 200


def test_the_search_for_a_port_ends(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all ports that are tried are in use, the error says which and what to do."""
    taken = start()
    monkeypatch.setattr(server_module, "PORT_TRIES", 1)
    with pytest.raises(OutputError, match=rf"no free port on 127\.0\.0\.1 from {taken.port} to {taken.port}; set"):
        start(port=taken.port)


def test_the_search_does_not_leave_the_ports_there_are(start: Any) -> None:
    """Port 65535 in use has no next one."""
    with socket.create_server(("127.0.0.1", 65535)), pytest.raises(OutputError, match="from 65535 to 65535"):
        start(port=65535)


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.host.invalid", "a..b", "nul\0", "x" * 70 + ".org"])
def test_an_address_that_is_not_ours(start: Any, address: str) -> None:
    """An address of another machine, or none at all, is one clear error."""
    with pytest.raises(OutputError, match="the metrics endpoint cannot listen on"):
        start(address=address)


def test_ipv6(start: Any) -> None:
    """An IPv6 address works, and stands in brackets."""
    server = start(address="::1")
    assert server.url == f"http://[::1]:{server.port}/metrics"
    with socket.create_connection(("::1", server.port), timeout=30) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.0 200 OK"


def test_closing_gives_the_port_back_at_once() -> None:
    """After close, which may be called twice, the same port can be served again and has been all along."""
    first = serve(registry_of(gpu_snapshot), Endpoint())
    assert ask(first)[0] == 200
    first.close()
    first.close()
    with serve(registry_of(gpu_snapshot), Endpoint(port=first.port)) as second:
        assert second.port == first.port
        assert ask(second)[0] == 200


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=255))
    | st.from_regex(r"(text/plain|application/openmetrics-text);\s*version=[\d.a-z \"]*", fullmatch=True)
)
def test_no_accept_header_makes_it_fail(accept: str) -> None:
    """Whatever a client accepts, it gets metrics: the client library alone fails on `version=x`."""
    statuses = []
    environ = {"PATH_INFO": "/metrics", "REQUEST_METHOD": "GET", "HTTP_ACCEPT": accept, "QUERY_STRING": ""}
    body = b"".join(metrics_app(registry_of(gpu_snapshot))(environ, lambda status, headers: statuses.append(status)))
    assert statuses == ["200 OK"]
    assert b"memtrace_up" in body


def test_the_endpoint_of_the_settings(tmp_path: Path) -> None:
    """Each local rank has a port of its own, and the password may come from a file."""
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\nnot the password\n", encoding="utf-8")
    config = TracerConfig(
        port=1000,
        address="0.0.0.0",
        tls_cert_file="c.pem",
        tls_key_file="k.pem",
        basic_auth_user="prometheus",
        basic_auth_password_file=file,
    )
    assert Endpoint.of(config, local_rank=3) == Endpoint(
        address="0.0.0.0",
        port=1003,
        tls=TlsFiles(cert_file=Path("c.pem"), key_file=Path("k.pem")),
        credentials=CREDENTIALS,
    )


def test_ports_of_the_settings() -> None:
    """No port means no endpoint, 0 any port for every rank, and no rank asks for a port above the last one."""
    assert Endpoint.of(TracerConfig(port=None)) is None
    assert Endpoint.of(TracerConfig(port=0), local_rank=3) == Endpoint(port=0)
    assert Endpoint.of(TracerConfig(port=65534), local_rank=3) == Endpoint(port=65535)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"", "on its first line"), (b"\xff", "cannot be read: it is not UTF-8")],
)
def test_a_password_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A password file that is missing, empty or no text is an error before training starts."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Endpoint.of(TracerConfig(basic_auth_user="u", basic_auth_password_file=file))
