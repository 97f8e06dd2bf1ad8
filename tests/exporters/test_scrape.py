"""A real Prometheus scrapes the real endpoint: in clear, with TLS and a password, and across a fault."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_server import PrometheusServer
from records import gpu_snapshot

from memtrace.categories import Moment
from memtrace.exporters.prometheus import registry_of
from memtrace.exporters.server import Credentials, Endpoint, MetricsServer, TlsFiles, serve
from memtrace.snapshot import Snapshot

USER = Credentials(user="prometheus", password="s3cret:ü")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scraped:
    """A Prometheus and what its job `train` scrapes: always the last of `snapshots`."""

    prometheus: PrometheusServer
    snapshots: list[Snapshot]


def certificate(directory: Path) -> TlsFiles:
    """Returns a certificate for 127.0.0.1 that vouches for itself, and its key."""
    files = TlsFiles(cert_file=directory / "cert.pem", key_file=directory / "key.pem")
    kind = ["-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subject = ["-subj", "/CN=memtrace", "-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-out", str(files.cert_file), "-keyout", str(files.key_file)]
    subprocess.run(["openssl", "req", *kind, *subject, *out], check=True, capture_output=True)
    return files


def target(server: MetricsServer) -> dict[str, object]:
    return {"static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """One Prometheus for all tests of the file: it takes 5 s to look at its targets for the first time."""
    directory = tmp_path_factory.mktemp("prometheus")
    files = certificate(tmp_path_factory.mktemp("tls"))
    snapshots = [gpu_snapshot()]
    with (
        serve(registry_of(lambda: snapshots[-1]), Endpoint()) as clear,
        serve(registry_of(gpu_snapshot), Endpoint(tls=files, credentials=USER)) as locked,
    ):
        https = target(locked) | {"scheme": "https", "tls_config": {"ca_file": str(files.cert_file)}}
        user = {"basic_auth": {"username": USER.user, "password": USER.password}}
        jobs = [
            {"job_name": "train"} | target(clear),
            {"job_name": "let in"} | https | user,
            {"job_name": "kept out"} | https,
        ]
        with PrometheusServer(directory, jobs) as prometheus:
            prometheus.wait_for("count(up) == 3")
            yield Scraped(prometheus=prometheus, snapshots=snapshots)


def test_prometheus_answers_with_the_categories_of_the_record(scraped: Scraped) -> None:
    """`sum by (category)` of what was scraped equals the breakdown that was exported."""
    record = scraped.snapshots[0].latest
    assert record is not None
    for moment in (Moment.PEAK, Moment.STEP_END):
        selector = f'memtrace_memory_bytes{{job="train", moment="{moment}"}}'
        answer = scraped.prometheus.wait_for(f"sum by (category) ({selector})")
        sums = {sample.labels["category"]: sample.value for sample in answer}
        assert sums == record.moments[moment].by_category()


def test_prometheus_scrapes_with_tls_and_password(scraped: Scraped) -> None:
    """Prometheus' own settings for TLS and basic auth fit the endpoint's."""
    assert scraped.prometheus.wait_for('memtrace_run_info{job="let in", run="llama"}')


def test_prometheus_is_kept_out_without_the_password(scraped: Scraped) -> None:
    """A job that does not know the password has a target that is down, and no series of it."""
    assert scraped.prometheus.wait_for('up{job="kept out"} == 0')
    assert scraped.prometheus.query('memtrace_up{job="kept out"}') == []


def test_series_vanish_when_a_fault_switches_memtrace_off(scraped: Scraped) -> None:
    """Once memtrace is off, what it last measured does not stand as if it were current; the counters stay."""
    prometheus = scraped.prometheus
    prometheus.wait_for('memtrace_memory_bytes{job="train"}')
    scraped.snapshots.append(gpu_snapshot(up=False))
    prometheus.wait_for('memtrace_up{job="train"} == 0')
    assert prometheus.query('memtrace_memory_bytes{job="train"}') == []
    assert [sample.value for sample in prometheus.query('memtrace_steps_total{job="train"}')] == [12]
    scraped.snapshots.pop()
    prometheus.wait_for('memtrace_memory_bytes{job="train"}')
