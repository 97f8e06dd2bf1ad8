"""A real Prometheus scrapes the real endpoint: with TLS and a password, and across a fault."""

from __future__ import annotations

import subprocess
from pathlib import Path

from prometheus_server import PrometheusFactory
from records import gpu_snapshot

from memtrace.exporters.endpoint.server import Credentials, Endpoint, MetricsServer, TlsFiles, serve
from memtrace.exporters.prometheus import registry_of
from memtrace.record.categories import Moment

USER = Credentials(user="prometheus", password="s3cret:ü")


def certificate(directory: Path) -> TlsFiles:
    """Returns a certificate for 127.0.0.1 that vouches for itself, and its key."""
    files = TlsFiles(cert_file=directory / "cert.pem", key_file=directory / "key.pem")
    kind = ["-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subject = ["-subj", "/CN=memtrace", "-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-out", str(files.cert_file), "-keyout", str(files.key_file)]
    subprocess.run(["openssl", "req", *kind, *subject, *out], check=True, capture_output=True)
    return files


def job(name: str, server: MetricsServer, **settings: object) -> dict[str, object]:
    return {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}], **settings}


def test_prometheus_answers_with_the_categories_of_the_record(
    prometheus_factory: PrometheusFactory, tmp_path: Path
) -> None:
    """Over TLS and with the password, `sum by (category)` equals the breakdown; without it the target is down."""
    files = certificate(tmp_path)
    snapshot = gpu_snapshot()
    assert snapshot.latest is not None
    with serve(registry_of(lambda: snapshot), Endpoint(tls=files, credentials=USER)) as server:
        tls = {"scheme": "https", "tls_config": {"ca_file": str(files.cert_file)}}
        user = {"basic_auth": {"username": USER.user, "password": USER.password}}
        jobs = [job("let in", server, **tls, **user), job("kept out", server, **tls)]
        prometheus = prometheus_factory(scrape_configs=jobs)
        for moment in (Moment.PEAK, Moment.STEP_END):
            selector = f'memtrace_memory_bytes{{job="let in", moment="{moment}"}}'
            answer = prometheus.wait_for(f"sum by (category) ({selector})")
            sums = {sample.labels["category"]: sample.value for sample in answer}
            assert sums == snapshot.latest.moments[moment].by_category()
        assert prometheus.wait_for('up{job="kept out"} == 0')
        assert prometheus.query('memtrace_up{job="kept out"}') == []


def test_series_vanish_when_a_fault_switches_memtrace_off(prometheus_factory: PrometheusFactory) -> None:
    """Once memtrace is off, what it last measured does not stand as if it were current; the counters stay."""
    shown = [gpu_snapshot()]
    with serve(registry_of(lambda: shown[-1]), Endpoint()) as server:
        prometheus = prometheus_factory(scrape_configs=[job("train", server)])
        prometheus.wait_for("memtrace_memory_bytes")
        shown.append(gpu_snapshot(up=False))
        prometheus.wait_for("memtrace_up == 0")
        assert prometheus.query("memtrace_memory_bytes") == []
        assert [sample.value for sample in prometheus.query("memtrace_steps_total")] == [12]
