"""Tests of the state of Ray's GCS in Redis, with a real Redis that needs a password."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from ray._private import node, services

from cluster import up
from cluster.errors import ConfigError
from cluster.host.gcs import GcsConfig
from cluster.ledger import open_ledger
from cluster.ledger.events import ClusterStopped
from cluster.node import gcs_store, ray_start
from cluster.node.description import describe_machine
from cluster.node.launch import StartFailed, shared_overrides
from cluster.security.tls.certificates import ensure_tls
from cluster.session import ClusterRecord, find_own_record, write_record
from cluster.settings import ClusterConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout
from cluster.supervisor.lost_head import has_saved_state
from tests.servers.ports import free_port
from tests.servers.redis_server import running_redis

PASSWORD = "correct-horse-battery-staple"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """File with the password."""
    path = tmp_path / "redis.password"
    path.touch(mode=0o600)
    path.write_text(f"{PASSWORD}\n")
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_redis("--requirepass", PASSWORD) as url:
        yield url


@pytest.fixture
def config(tmp_path: Path, server: str, secret: Path) -> PlatformConfig:
    gcs = GcsConfig(url=server, password_file=str(secret))
    return PlatformConfig(storage=StorageConfig(root=str(tmp_path)), cluster=ClusterConfig(gcs=gcs))


@pytest.fixture
def record(config: PlatformConfig) -> ClusterRecord:
    """Record of a cluster of which no process runs."""
    record = describe_machine(config, cluster_id="abc")
    record = replace(record, overrides=shared_overrides(config, record))
    write_record(record, config.storage)
    return record


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a server with TLS, and the file of its authority."""
    places = Layout(str(tmp_path_factory.mktemp("redis")))
    ensure_tls(places)
    port, folder = free_port(), Path(places.tls)
    files = {"cert": "node.pem", "key": "node.key", "ca-cert": "ca.pem"}
    options = [text for name, file in files.items() for text in (f"--tls-{name}-file", str(folder / file))]
    options += ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", PASSWORD]
    with running_redis(*options):
        yield f"rediss://127.0.0.1:{port}", folder / "ca.pem"


@pytest.mark.parametrize("trusted", [True, False])
def test_gcs_uses_tls_and_takes_the_password_from_its_environment(
    tls: tuple[str, Path], secret: Path, tmp_path: Path, trusted: bool
) -> None:
    """Ray's own program, with a real Redis. A server of another authority gets no password."""
    url, authority = tls
    if not trusted:
        ensure_tls(Layout(str(tmp_path / "other")))
        authority = tmp_path / "other" / "tls" / "ca.pem"
    gcs = GcsConfig(url=url, password_file=str(secret), ca_file=str(authority))
    record = replace(describe_machine(PlatformConfig(), cluster_id=f"gcs{trusted}"), overrides=[])
    host, port = url.removeprefix("rediss://").split(":")
    options = {"redis_address": host, "redis_port": port, "redis_enable_ssl": "true", "session-name": "s"}
    options |= {"log_dir": str(tmp_path), "session-dir": str(tmp_path), "node-ip-address": "127.0.0.1"}
    options |= {"gcs_server_port": "0", "metrics-agent-port": "-1", "node-id": "00", "config_list": "e30="}
    command = [services.GCS_SERVER_EXECUTABLE, *(f"--{name}={value}" for name, value in options.items())]
    command += ray_start.gcs_options(user=gcs.user, password=PASSWORD)
    variables = gcs_store.ray_environment(gcs, record) | gcs_store.secret_environment(gcs)
    output = tmp_path / "output"
    with output.open("wb") as sink:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + 60
        if trusted:
            while not gcs_store.has_state(gcs, record):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            gcs_store.remove_state(gcs, record)
        else:
            assert process.wait(60) != 0
            with pytest.raises(ConfigError, match="certificate verify failed"):
                gcs_store.has_state(gcs, record)
    finally:
        process.kill()
        process.wait(10)
    assert PASSWORD not in " ".join(command)
    assert PASSWORD.encode() not in output.read_bytes()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:x@10.0.0.1", r"cluster\.gcs\.url holds a password.*cluster\.gcs\.password_file"),
        ("http://10.0.0.1", r"cluster\.gcs\.url must begin with redis://"),
        ("redis://10.0.0.1/3", "with database 0"),
        ("redis://", "redis://host:port"),
    ],
)
def test_unsuitable_addresses_are_refused(url: str, message: str) -> None:
    """A password would be in command lines, and Ray uses database 0 only."""
    with pytest.raises(ValueError, match=message):
        GcsConfig(url=url)


def test_redis_is_checked_before_a_start(config: PlatformConfig, secret: Path) -> None:
    """One line says what is wrong, and none has the password."""
    gcs_store.require_redis(GcsConfig())
    gcs_store.require_redis(config.cluster.gcs)
    away = replace(config.cluster.gcs, url=f"redis://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"cannot be used.*Start it, or correct cluster\.gcs\.url"):
        up.check(replace(config, cluster=replace(config.cluster, gcs=away)))
    secret.write_text("wrong")
    with pytest.raises(ConfigError, match="refuses the user or the password"):
        gcs_store.require_redis(config.cluster.gcs)
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="Other users of this machine can read"):
        gcs_store.require_redis(config.cluster.gcs)
    secret.unlink()
    with pytest.raises(ConfigError, match=r"password_file=.* cannot be read"):
        gcs_store.require_redis(config.cluster.gcs)


def test_redis_on_the_network_needs_a_password() -> None:
    """Who can write Ray's state can run code on every node."""
    with pytest.raises(ConfigError, match=r"on the network.*cluster\.gcs\.password_file"):
        gcs_store.require_redis(GcsConfig(url="redis://redis.example"))


def test_search_in_a_large_database_ends(
    config: PlatformConfig, record: ClusterRecord, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The online store of the same Redis can have millions of keys."""
    client = redis.Redis.from_url(server, password=PASSWORD)
    client.mset({f"other{number}": "" for number in range(3000)})
    assert not gcs_store.has_state(config.cluster.gcs, record)
    monkeypatch.setattr(gcs_store, "SCAN_S", 0.0)
    with pytest.raises(ConfigError, match="a Redis of its own"):
        gcs_store.has_state(config.cluster.gcs, record)
    client.flushall()
    client.close()


def test_cluster_with_state_in_redis_goes_on(
    config: PlatformConfig, record: ClusterRecord, server: str
) -> None:
    """Its head has crashed. Without state there, or after a start that was killed, a new cluster begins."""
    client = redis.Redis.from_url(server, password=PASSWORD)
    client.hset("RAYother@NODE", "a", "b")
    assert not has_saved_state(record)
    client.hset("RAYabc@NODE", "a", "b")
    assert up.running_record(config) == record
    assert open_ledger(config).last(ClusterStopped) is None
    gcs_store.remove_state(config.cluster.gcs, record)
    assert client.keys("*") == [b"RAYother@NODE"]
    client.hset("RAYabc@NODE", "a", "b")
    write_record(replace(record, starting=True), config.storage)
    assert up.running_record(config) is None
    assert open_ledger(config).last(ClusterStopped) is not None
    assert client.keys("*") == [b"RAYother@NODE"]
    client.flushall()
    client.close()


def test_nobody_gives_up_a_cluster_because_redis_is_away(
    config: PlatformConfig, record: ClusterRecord
) -> None:
    """The refusal names the only command that does."""
    away = replace(config.cluster.gcs, url=f"redis://127.0.0.1:{free_port()}")
    lost = replace(config, cluster=replace(config.cluster, gcs=away))
    write_record(replace(record, overrides=shared_overrides(lost, record)), config.storage)
    with pytest.raises(ConfigError, match=r"Cluster abc can go on only with its state.*cluster\.down"):
        up.running_record(config)


def test_a_failed_start_is_undone_also_without_redis(
    config: PlatformConfig,
    record: ClusterRecord,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The operator sees why the start failed, and the next start finds no record."""

    def fail(*_: object) -> None:
        config.cluster.gcs = replace(config.cluster.gcs, url=f"redis://127.0.0.1:{free_port()}")
        raise StartFailed("Ray did not start")

    monkeypatch.setattr(up, "_start_parts", fail)
    monkeypatch.setattr(up, "describe", lambda _: record)
    for name in ("check", "prepare", "warn_of_spilling"):
        monkeypatch.setattr(up, name, lambda *_: None)
    with pytest.raises(StartFailed, match="Ray did not start"):
        up.start(config)
    assert find_own_record(config.storage) is None
    assert "keys RAYabc@* of Ray stay in Redis" in capsys.readouterr().err


def test_password_reaches_the_gcs_in_its_environment_only(
    config: PlatformConfig, record: ClusterRecord, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password is in no command line, and no other process of Ray gets it. The raylet gets its agent's port."""
    started: list[tuple[list[str], dict[str, Any]]] = []
    asked: list[tuple[Any, ...]] = []
    gcs, raylet = [services.GCS_SERVER_EXECUTABLE, "--x"], [services.RAYLET_EXECUTABLE, "--y"]
    monkeypatch.setattr(sys, "argv", ["ray", "start", "--dashboard-agent-listen-port=20123"])

    def ray() -> int:
        services.start_ray_process(gcs, "gcs_server", fate_share=True)
        services.start_ray_process(raylet, "raylet", fate_share=True)
        vars(node)["get_session_key_from_storage"]("host", 6379, "", "", False, b"{}", b"session_name")
        return 0

    monkeypatch.setattr(ray_start, "ray", ray)
    monkeypatch.setattr(services, "start_ray_process", services.start_ray_process)
    monkeypatch.setattr(node, "get_session_key_from_storage", None, raising=False)
    monkeypatch.setattr(
        ray_start, "_start_process", lambda command, *_, **options: started.append((command, options))
    )
    monkeypatch.setattr(ray_start, "_session_key", lambda *arguments: asked.append(arguments))
    with_user = replace(config.cluster.gcs, url="redis://ray@10.0.0.9")
    for name, value in gcs_store.ray_environment(with_user, record).items():
        assert PASSWORD not in value
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        ray_start.main()
    assert ended.value.code == 0
    assert started[0][0] == [*gcs, "--redis_username=ray", "--fromenv=redis_password"]
    assert started[0][1]["env_updates"] == {"FLAGS_redis_password": PASSWORD}
    assert started[1] == ([*raylet, "--dashboard_agent_listen_port=20123"], {"fate_share": True})
    assert asked == [("host", 6379, "ray", PASSWORD, False, b"{}", b"session_name")]
    assert gcs_store.PASSWORD_FILE_VARIABLE not in os.environ
    assert gcs_store.secret_environment(config.cluster.gcs) == {"FLAGS_redis_password": PASSWORD}
