"""The metrics of the cluster's own processes follow Prometheus' conventions."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.membership.metrics import NodeMetrics
from cluster.metrics import RequestMetrics, new_registry, serve_metrics
from cluster.records.metrics import UploadMetrics
from cluster.security.keys.metrics import BrokerMetrics
from cluster.session import METRICS_PORTS
from cluster.supervisor.metrics import SupervisorMetrics
from jobs.schedule.metrics import MonitorMetrics, SchedulerMetrics
from jobs.submission.metrics import JobMetrics
from serve_apps.edge.control.metrics import EdgeMetrics
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.evidence.collecting import Collected
from tests.servers.polling import wait_until
from tests.servers.ports import free_port

ANSWERS = {"wrap": {"ok": True}, "unwrap": {"error": "AccessDenied"}, "guess": {"error": "KeyNotFound"}}

MONITORED = {
    "model": "m",
    "variant": "champion",
    "version": 2,
    "periods": {
        "2025": {"estimated_auc": 0.9, "realised_auc": 0.8, "realisation": {"alert": True}},
        "2026": {"estimated_auc": 0.7, "realised_auc": None, "estimate": {"alert": True}, "realisation": None},
    },
    "drift": {"age": ["2025", "2026"], "sex": ["2026"]},
    "reconstruction": ["2026"],
}  # fmt: skip
"""Payload of a monitoring event. Older ones lack `missing`, `unseen` and `traffic`."""


def ask(metrics: RequestMetrics) -> None:
    """Answer one request of each result."""
    for operation, answer in ANSWERS.items():
        metrics.measure({"op": operation}, lambda _, answer=answer: answer)  # type: ignore[misc]
    metrics.refused_connections.inc()


def supervisor(registry: CollectorRegistry) -> None:
    metrics = SupervisorMetrics(registry)
    metrics.up.labels("key broker").set(1)
    metrics.restarts.labels("edge", "dead").inc()
    metrics.failures.labels("edge").inc()
    metrics.recovery.observe(30)


def edge(registry: CollectorRegistry) -> None:
    metrics = EdgeMetrics(registry)
    metrics.loads.labels("ok").inc()
    metrics.count(Collected(records=2, broken=1, behind_bytes=10))


def nodes(registry: CollectorRegistry) -> None:
    metrics = NodeMetrics(registry)
    metrics.count_nodes(alive=lambda: 1, members=lambda: 2)
    ask(metrics)


def uploader(registry: CollectorRegistry) -> None:
    UploadMetrics(registry).count(uploaded=2, failed=1, behind=[dt.datetime(2026, 1, 1, tzinfo=dt.UTC)])


def scheduler(registry: CollectorRegistry) -> None:
    metrics = SchedulerMetrics(registry)
    metrics.last_check.set_to_current_time()
    metrics.show("nightly", last_success=dt.datetime(2026, 1, 1, tzinfo=dt.UTC), unfinished=1)
    MonitorMetrics(registry).show(MONITORED, time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC))


def jobs(registry: CollectorRegistry) -> None:
    metrics = JobMetrics(registry)
    metrics.requests.labels("submit", "202").inc()
    metrics.seconds.labels("submit").observe(0.1)
    metrics.count_unfinished(lambda: 1)
    metrics.last_check.set_to_current_time()


PROCESSES: dict[str, Callable[[CollectorRegistry], None]] = {
    "supervisor": supervisor,
    "broker": lambda registry: ask(BrokerMetrics(registry)),
    "edge_controller": edge,
    "nodes": nodes,
    "uploader": uploader,
    "scheduler": scheduler,
    "jobs": jobs,
    "rollouts": lambda registry: ControllerMetrics(registry).acts.set(1),
}


def exported(process: str) -> bytes:
    """Return what a process exports after some work."""
    registry = new_registry()
    PROCESSES[process](registry)
    return generate_latest(registry)


def test_every_metrics_port_has_a_process_in_these_tests() -> None:
    assert {f"{name}_metrics" for name in PROCESSES} >= set(METRICS_PORTS)


@pytest.mark.parametrize("process", PROCESSES)
def test_promtool_finds_no_fault(process: str) -> None:
    """Prometheus' own check of names, types, units and descriptions."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("SKIPPED LOUDLY: promtool is not installed (Debian: apt install prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=exported(process), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


@pytest.mark.parametrize("process", PROCESSES)
def test_names_begin_with_the_project_and_each_process_says_when_it_last_succeeded(process: str) -> None:
    """The standard metrics of a process have standard names. No name ends in the type of its metric."""
    families = {family.name: family for family in text_string_to_metric_families(exported(process).decode())}
    assert "process_start_time_seconds" in families
    own = [name for name in families if not name.startswith("process_")]
    assert all(name.startswith("falaj_") for name in own)
    assert [name for name in own if name.endswith("_last_success_timestamp_seconds")]
    assert not [
        name for name in own if name.endswith(("_total", "_counter", "_gauge", "_histogram", "_created"))
    ]


def test_requests_are_counted_by_result() -> None:
    """Clients cannot create metrics: unknown operations count as one. Only a success sets its time."""
    registry = new_registry()
    metrics = BrokerMetrics(registry)
    assert registry.get_sample_value("falaj_broker_last_success_timestamp_seconds") == 0
    ask(metrics)
    for operation, result in (("wrap", "ok"), ("unwrap", "refused"), ("other", "failed")):
        labels = {"operation": operation, "result": result}
        assert registry.get_sample_value("falaj_broker_requests_total", labels) == 1
    last = registry.get_sample_value("falaj_broker_last_success_timestamp_seconds")
    assert last is not None
    assert 0 <= time.time() - last < 60


def test_a_round_of_the_uploader_with_a_failure_is_no_success() -> None:
    """The number of waiting logs and the oldest time are those of the last round."""
    registry = new_registry()
    metrics = UploadMetrics(registry)
    old = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    metrics.count(uploaded=2, failed=1, behind=[old, old + dt.timedelta(days=1)])
    value = registry.get_sample_value
    assert value("falaj_uploader_last_success_timestamp_seconds") == 0
    assert value("falaj_uploader_waiting_logs") == 2
    assert value("falaj_uploader_oldest_waiting_timestamp_seconds") == old.timestamp()
    metrics.count(uploaded=1, failed=0, behind=[])
    assert value("falaj_uploader_segments_total", {"result": "ok"}) == 3
    assert (value("falaj_uploader_last_success_timestamp_seconds") or 0) > old.timestamp()
    assert value("falaj_uploader_waiting_logs") == 0


def test_the_number_of_nodes_is_read_at_the_scrape() -> None:
    """It is not updated by requests, so it stays right when all nodes are silent."""
    registry, alive = new_registry(), [2]
    NodeMetrics(registry).count_nodes(alive=lambda: alive[0], members=lambda: 2)
    assert registry.get_sample_value("falaj_nodes_alive") == 2
    alive[0] = 0
    assert registry.get_sample_value("falaj_nodes_alive") == 0


def test_metrics_are_served_on_loopback_only() -> None:
    """Also on a cluster at a network address: Prometheus scrapes from the machine itself."""
    port, registry = free_port(), new_registry()
    supervisor(registry)
    serve_metrics(registry, port=port)

    def scrape() -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return bytes(response.read())

    def answers() -> bool:
        try:
            return bool(scrape())
        except OSError:
            return False

    wait_until(answers, seconds=10)
    assert b'falaj_supervisor_restarts_total{part="edge",reason="dead"} 1.0' in scrape()


def test_gauges_of_monitoring_have_the_newest_performance_and_the_number_of_alerts() -> None:
    """A period without outcomes keeps the realised performance of the period before."""
    text = exported("scheduler").decode()
    labels = 'model="m",variant="champion",version="2"'
    for line in (
        f'falaj_monitor_performance{{kind="estimated",metric="auc",{labels}}} 0.7',
        f'falaj_monitor_performance{{kind="realised",metric="auc",{labels}}} 0.8',
        f'falaj_monitor_alerts{{kind="drift",{labels}}} 3.0',
        f'falaj_monitor_alerts{{kind="performance",{labels}}} 2.0',
        f'falaj_monitor_alerts{{kind="reconstruction",{labels}}} 1.0',
        f'falaj_monitor_alerts{{kind="traffic",{labels}}} 0.0',
    ):
        assert line in text
