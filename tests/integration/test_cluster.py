"""Tests of the cluster's life cycle: up, status, down, and refused commands."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.host import processes
from cluster.ledger.events import (
    ClusterStarted,
    ClusterStopped,
    LedgerEvent,
    ProcessRestarted,
    ServingRestored,
)
from cluster.ledger.store import Entry
from cluster.node.parts import Part, inspect_parts, not_running
from cluster.session import is_up, metrics_urls
from tests.integration.conftest import refusal

if TYPE_CHECKING:
    from tests.integration.conftest import Project

TOKEN = ("token", "--sub", "alice", "--role", "service", "--purpose", "testing")
NAMED = ("gcs", "dashboard", "edge", "edge_metrics", "ray_metrics")


def status_of(
    url: str, *, token: str | None = None, ca: Path | None = None, body: bytes | None = None
) -> int:
    """Return the HTTP status of a GET, or of a POST if there is a body."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, data=body, headers=headers)
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def entries(project: Project, kind: type[LedgerEvent]) -> list[Entry]:
    """Return a project's ledger entries of one type."""
    return list(project.ledger().entries(kind))


def events(project: Project, kind: type[LedgerEvent]) -> list[Any]:
    """Return a project's events of one type."""
    return [entry.event() for entry in entries(project, kind)]


@contextmanager
def attached_driver(project: Project) -> Iterator[subprocess.Popen[str]]:
    """Run a separate process that is attached to the cluster."""
    program = (
        "from cluster.session import attach; from cluster.settings import PlatformConfig; import sys;"
        "attach(PlatformConfig()); print('attached', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        cwd=project.root,
        env=project.env,
        text=True,
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
    ) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline().strip() == "attached"
            yield driver
        finally:
            driver.kill()


def test_everything_answers_and_nothing_open_answers_without_a_token(falaj_cluster: Project) -> None:
    """Each endpoint answers, and protected endpoints require a token.

    The edge uses TLS with a certificate of our CA. Ray's dashboard requires Ray's token; through the edge, it
    requires an admin's token.
    """
    record = falaj_cluster.record
    ca = falaj_cluster.storage_root / "tls" / "ca.pem"
    assert status_of(f"{record.edge_url}/v2/health/live", ca=ca) == 200
    assert status_of(f"{record.edge_url}/v2/models/none", ca=ca) == 401
    assert status_of(f"{record.dashboard_url}/api/cluster_status") == 401
    ray_token = Path(record.token_path).read_text().strip()
    assert status_of(f"{record.dashboard_url}/api/cluster_status", token=ray_token) == 200
    assert status_of(f"{record.edge_url}/ray/api/cluster_status", ca=ca) == 401
    assert status_of(f"{record.edge_url}/ray/api/cluster_status", ca=ca, token=ray_token) == 401
    for role, expected in (("service", 403), ("admin", 200)):
        token = falaj_cluster.token(role)
        assert status_of(f"{record.edge_url}/ray/api/cluster_status", ca=ca, token=token) == expected
    assert status_of(record.metrics_url) == 200
    assert status_of(record.ray_metrics_url) == 200


def test_features_and_outcomes_are_there_before_any_model(falaj_cluster: Project) -> None:
    """Features and outcomes are served before a model exists.

    The applications answer 404 for an unknown service, view or model.
    """
    token = falaj_cluster.token("service")
    ca = falaj_cluster.storage_root / "tls" / "ca.pem"
    asked: dict[str, dict[str, Any]] = {
        "features:read": {"service": "none", "entities": [{"a": 1}]},
        "features:push": {"view": "none", "idempotency_key": "a", "rows": [{}]},
        "outcomes": {"model": "none", "outcomes": [{"prediction_id": "a", "outcome": 1}]},
    }
    for path, body in asked.items():
        url = f"{falaj_cluster.edge_url}/v1/{path}"
        assert status_of(url, ca=ca, token=token, body=json.dumps(body).encode()) == 404, path
    running = json.loads(falaj_cluster.run("cluster.status", "--json", check=True).stdout)["applications"]
    assert {name: running.get(name) for name in ("features", "outcomes")} == {
        "features": "RUNNING",
        "outcomes": "RUNNING",
    }


def test_the_edge_refuses_an_older_tls(falaj_cluster: Project) -> None:
    """The edge requires at least TLS 1.3."""
    context = ssl.create_default_context(cafile=str(falaj_cluster.storage_root / "tls" / "ca.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", falaj_cluster.ports["edge"]), timeout=10) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.parametrize("certificate", [True, False])
def test_rays_own_port_answers_nobody_without_a_certificate(
    falaj_cluster: Project, certificate: bool
) -> None:
    """Ray's GCS port requires TLS and a client certificate of the cluster's CA.

    The Ray token alone is not enough.
    """
    folder = falaj_cluster.storage_root / "tls"
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    with (
        socket.create_connection(("127.0.0.1", falaj_cluster.record.ports["gcs"]), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            heard = connection.recv(100)
        except (ssl.SSLError, ConnectionError):
            heard = b""
    assert bool(heard) == certificate


def test_secrets_are_for_their_owner_only(falaj_cluster: Project) -> None:
    """Private keys and Ray's token have mode 0600."""
    root = falaj_cluster.storage_root
    secret = [root / "keys" / name for name in ("ray_token", "issuer.pem", "ledger.pem")]
    for path in [*secret, root / "tls" / "edge.pem", root / "tls" / "ca.key"]:
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_the_node_has_the_configured_size_and_region(falaj_cluster: Project) -> None:
    """Logical resources and the region label come from the configuration."""
    program = (
        "from cluster.session import attach; from cluster.settings import PlatformConfig; import json, ray;"
        "attach(PlatformConfig()); [node] = ray.nodes();"
        "print(json.dumps({'cpus': ray.cluster_resources()['CPU'], 'labels': node['Labels']}))"
    )
    result = falaj_cluster.run_python("-c", program, check=True)
    node = json.loads(result.stdout.splitlines()[-1])
    [started] = events(falaj_cluster, ClusterStarted)
    assert isinstance(started, ClusterStarted)
    assert node["cpus"] == started.num_cpus == 8
    assert node["labels"]["ray.io/availability-region"] == started.region == "local"


def test_a_shell_in_another_folder_attaches_with_what_status_prints(
    falaj_cluster: Project, tmp_path: Path
) -> None:
    """A shell in any folder can attach with only the variables that `status --env` prints."""
    program = (
        "from cluster.session import attach; from cluster.settings import PlatformConfig;"
        "print(attach(PlatformConfig()).cluster_id)"
    )
    result = falaj_cluster.run_python("-c", program, cwd=tmp_path, check=True)
    assert result.stdout.split()[-1] == falaj_cluster.record.cluster_id
    assert not (tmp_path / ".falaj").exists()


def test_a_shell_below_the_project_needs_no_variables(falaj_cluster: Project) -> None:
    """A command in a subfolder finds the cluster's record in a parent folder."""
    below = falaj_cluster.root / "notebooks" / "one"
    below.mkdir(parents=True)
    result = falaj_cluster.without_cluster_variables().run("cluster.status", "--json", cwd=below, check=True)
    assert json.loads(result.stdout)["cluster_id"] == falaj_cluster.record.cluster_id


def test_status_names_what_listens_and_who_guards_it(falaj_cluster: Project) -> None:
    """Status shows the cluster's named ports. It mentions a token only for ports that require one."""
    text = falaj_cluster.run("cluster.status", check=True).stdout
    lines = {name: next(line for line in text.splitlines() if f" {name} " in line) for name in NAMED}
    assert all(f":{falaj_cluster.ports[name]} " in line for name, line in lines.items())
    assert {name for name, line in lines.items() if "token" in line} == {"gcs", "dashboard", "edge"}


def test_everything_listens_on_loopback_only(falaj_cluster: Project) -> None:
    """The cluster listens only on loopback, including Ray's own ports and metrics.

    Other machines cannot connect.
    """
    listening = falaj_cluster.listeners()
    assert {falaj_cluster.ports[name] for name in NAMED} <= set(listening)
    assert set(listening.values()) == {"127.0.0.1"}


def test_a_second_up_is_refused_and_harms_nothing(falaj_cluster: Project) -> None:
    """A second `up` is refused, and its message names the running cluster.

    The running cluster does not change.
    """
    before = falaj_cluster.record
    message = refusal(falaj_cluster.up(check=False))
    assert before.edge_url in message
    assert "cluster.down" in message
    assert falaj_cluster.record == before
    assert is_up(before)


def test_a_busy_port_is_named_with_its_owner(empty_project: Project) -> None:
    """`up` refuses a busy port and names the process that uses it. It starts nothing and leaves no record."""
    with socket.create_server(("127.0.0.1", empty_project.ports["edge"])):
        message = refusal(empty_project.up(check=False))
    assert str(empty_project.ports["edge"]) in message
    assert "python" in message
    assert "cluster.ports.edge=" in message
    assert not (empty_project.storage_root / "cluster.json").exists()


def test_without_a_cluster_jobs_and_status_are_refused_and_down_has_nothing_to_do(
    empty_project: Project,
) -> None:
    """Without a cluster, commands are refused and say how to start one. `down` succeeds."""
    assert "cluster.up" in refusal(empty_project.run("cluster.status", "--env"))
    assert "cluster.up" in refusal(empty_project.run("feature_jobs.apply"))
    assert "cluster.up" in refusal(empty_project.run("cluster.security.identity", *TOKEN))
    assert empty_project.run("cluster.down", check=True).stdout.strip() == "no cluster is up"


def test_an_unknown_setting_is_refused(empty_project: Project) -> None:
    """An unknown setting, or a value of the wrong type, is refused before anything starts."""
    assert "num_cpu" in refusal(empty_project.up("cluster.num_cpu=2", check=False))
    assert "num_cpus" in refusal(empty_project.up("cluster.num_cpus=many", check=False))


def test_a_failed_start_leaves_nothing_and_shows_the_log(empty_project: Project) -> None:
    """If the edge cannot start, `up` fails, shows the edge's error, and stops Ray.

    It frees all ports, and leaves no record and no event.
    """
    certificate = empty_project.storage_root / "tls" / "edge.pem"
    certificate.parent.mkdir(parents=True)
    certificate.write_text("no certificate")
    result = empty_project.up(check=False)
    assert result.returncode == 1
    assert "The edge did not start" in result.stderr
    assert "edge.pem" in result.stderr
    assert all(processes.port_is_free(port) for port in empty_project.ports.values())
    assert not (empty_project.storage_root / "cluster.json").exists()
    assert events(empty_project, ClusterStarted) == []


def test_a_lost_head_and_a_lost_supervisor_are_repaired_and_down_ends_all(
    falaj_cluster: Project, empty_project: Project
) -> None:
    """`up` restarts dead parts that status reports, and `down` ends all of the cluster's processes.

    The cluster keeps its record. Another cluster and an attached driver continue to run.
    """
    empty_project.up("cluster.num_cpus=2", "cluster.region=oman")
    first = empty_project.record
    there = {one.part: one.process for one in inspect_parts(first)}
    lost = (Part.supervisor, Part.raylet)
    for part in lost:
        process = there[part]
        assert process is not None
        process.kill()
        process.wait(10)
    status = empty_project.run("cluster.status")
    assert status.returncode == 1
    assert all(f"{part} " in status.stdout for part in lost)
    assert status.stdout.count("<- problem") >= 2
    assert "cluster.up" in status.stdout
    assert "repaired" in empty_project.up("cluster.num_cpus=2", "cluster.region=oman").stdout
    assert not_running(inspect_parts(first)) == []
    assert empty_project.record == first
    with attached_driver(empty_project) as driver:
        assert first.cluster_id in empty_project.run("cluster.down", check=True).stdout
        assert driver.poll() is None
    assert processes.find(first.cluster_id) == []
    assert not Path(first.runtime_folder).exists()
    for kind in (ClusterStarted, ClusterStopped):
        assert [event.cluster_id for event in events(empty_project, kind)] == [first.cluster_id]
    restarts = events(empty_project, ProcessRestarted)
    assert "Ray head" in [event.process for event in restarts]
    [restored] = entries(empty_project, ServingRestored)
    assert restored.actor == "system:supervisor"
    assert is_up(falaj_cluster.record)
    assert status_of(falaj_cluster.record.metrics_url) == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_comes_to_nothing(falaj_cluster: Project) -> None:
    """Another user of the machine gets permission errors.

    The user cannot list or replace the cluster's folders (sockets, keys, state, Ray), and cannot connect to
    its sockets.
    """
    record = falaj_cluster.record
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no python3 that every user may run")
    folders = [record.runtime_folder, record.temp_dir, str(record.gcs_dir), record.storage_root]
    attempts = {
        "os.listdir(path)": folders,
        "os.rename(path, path + '-old')": [*folders, str(Path(record.key_socket).parent)],
        "socket.socket(socket.AF_UNIX).connect(path)": [
            record.key_socket,
            f"{record.runtime_folder}/edge.sock",
        ],
    }
    for attempt, paths in attempts.items():
        for path in paths:
            program = f"import os, socket; path = {path!r}; {attempt}"
            tried = subprocess.run(
                [python, "-c", program],
                user=65534,
                group=65534,
                extra_groups=[],
                capture_output=True,
                text=True,
                cwd="/",
            )
            assert "PermissionError" in tried.stderr, (attempt, path, tried.stderr)


def test_our_own_processes_publish_their_metrics(falaj_cluster: Project) -> None:
    """Falaj's own processes publish metrics for Prometheus, on loopback."""
    found = {}
    for url in metrics_urls(falaj_cluster.record):
        with urllib.request.urlopen(url, timeout=10) as response:
            found[url] = response.read().decode()
    whole = "".join(found.values())
    for name in (
        'falaj_part_up{part="key broker"} 1.0',
        "falaj_broker_connections",
        "falaj_edge_applied_seq",
        "falaj_supervisor_last_success_timestamp_seconds",
        "falaj_edge_last_success_timestamp_seconds",
    ):
        assert name in whole
