"""Tests of `cluster.up`: its checks, preparation, and the processes' environment and configuration."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cluster import up
from cluster.errors import ClusterAlreadyUp, CompilerMissing, ConfigError, PortInUse
from cluster.host import processes
from cluster.ledger import open_ledger
from cluster.ledger.events import ClusterStopped, NodeLeft
from cluster.node import checks
from cluster.node.launch import StartFailed, remove_folders
from cluster.node.parts import BROKER, Part, PartStatus, State
from cluster.security.private_folder import ensure_private_folder
from cluster.session import ClusterRecord, write_record
from cluster.settings import (
    ClusterConfig,
    LedgerConfig,
    PlatformConfig,
    PortsConfig,
    StorageConfig,
    Tier,
)
from cluster.settings_conversion import load
from tests.samples.nodes import node_joined
from tests.servers.ports import free_port


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    """Return the configuration of a project on free ports."""
    ports = PortsConfig(**{name: free_port() for name in PortsConfig.__dataclass_fields__})
    return PlatformConfig(storage=StorageConfig(root=str(tmp_path)), cluster=ClusterConfig(ports=ports))


@pytest.fixture
def record(config: PlatformConfig) -> Iterator[ClusterRecord]:
    """Return the record of a cluster with this configuration."""
    record = up.describe(config)
    yield record
    remove_folders(record)


@pytest.fixture
def written(record: ClusterRecord, config: PlatformConfig) -> ClusterRecord:
    """Write the record to its file."""
    write_record(record, config.storage)
    return record


def start(stack: ExitStack, cluster_id: str, *command: str, folder: Path | None = None) -> psutil.Process:
    """Start a Python process of a cluster, and wait for its first line."""
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | {processes.ID_VARIABLE: cluster_id},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()
    return psutil.Process(process.pid)


@pytest.fixture
def listener() -> Iterator[Callable[..., None]]:
    """Return a function that starts a process of a cluster that listens on a port."""
    program = (
        "import socket, sys; server = socket.create_server(('127.0.0.1', int(sys.argv[1])));"
        "print(flush=True); sys.stdin.read()"
    )
    with ExitStack() as stack:
        yield lambda port, *, cluster_id: start(stack, cluster_id, "-c", program, str(port))


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Callable[[str], psutil.Process]]:
    """Return a function that starts a process with a key broker's command line."""
    package = tmp_path / "cluster" / "security" / "keys"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys; print(flush=True); sys.stdin.read()")
    with ExitStack() as stack:
        yield lambda cluster_id: start(stack, cluster_id, "-m", BROKER, folder=tmp_path)


def test_suitable_machine_passes_all_checks(config: PlatformConfig) -> None:
    up.check(config)


@pytest.mark.parametrize("name", checks.REFUSED_VARIABLES)
def test_a_variable_that_lets_parquet_run_code_is_refused(
    config: PlatformConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is refused for a start and for a repair, even if it is empty."""
    monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match=f"{name}.*Unset it"):
        up.check(config)
    with pytest.raises(ConfigError, match=f"{name}.*Unset it"):
        up.repair(config, up.describe(config))


@pytest.mark.parametrize("option", ["address", "edge_host"])
def test_an_address_of_another_machine_is_refused(config: PlatformConfig, option: str) -> None:
    """The message says how to find this machine's own addresses."""
    setattr(config.cluster, option, "192.0.2.7")
    message = rf"cluster\.{option}=192\.0\.2\.7 is not an address of this machine.*ip address"
    with pytest.raises(ConfigError, match=message):
        up.check(config)


@pytest.mark.parametrize("address", ["0.0.0.0", "head", "::1", ""])  # noqa: S104 (refused)
def test_an_address_that_names_no_machine_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"cluster\.address must be an IPv4 address"):
        ClusterConfig(address=address)


def test_a_network_address_needs_tls() -> None:
    """Ray's token would otherwise cross the network unencrypted."""
    with pytest.raises(ValueError, match="needs a loopback"):
        ClusterConfig(address="10.0.0.1", tls=False)


def test_a_missing_compiler_is_refused(config: PlatformConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(CompilerMissing, match=r"Install g\+\+"):
        up.check(config)


@pytest.mark.parametrize("name", sorted(PortsConfig.__dataclass_fields__))
def test_busy_port_is_named_with_its_process_and_setting(config: PlatformConfig, name: str) -> None:
    port = getattr(config.cluster.ports, name)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(PortInUse, match=rf"{port}.*pid \d+.*cluster\.ports\.{name}="),
    ):
        up.check(config)


def test_busy_default_metrics_port_is_replaced(config: PlatformConfig) -> None:
    """So a second cluster can start on the machine. A port that was set is kept."""
    ports = config.cluster.ports
    chosen, ports.broker_metrics = ports.supervisor_metrics, PortsConfig().broker_metrics
    with ExitStack() as stack:
        if processes.port_is_free(ports.broker_metrics):
            stack.enter_context(socket.create_server(("127.0.0.1", ports.broker_metrics)))
        up.avoid_taken_metrics_ports(ports)
        assert ports.broker_metrics in up.METRICS_RANGE
        assert ports.supervisor_metrics == chosen
        up.check(config)


def test_closed_connections_of_replicas_do_not_block_a_start(config: PlatformConfig) -> None:
    """Otherwise a cluster could not start in the minute after it was ended."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", config.cluster.ports.replicas))
        server.listen()
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()
    assert not processes.port_is_free(config.cluster.ports.replicas)
    up.check(config)


@pytest.mark.parametrize(("sealed", "warns"), [(True, False), (None, False), (False, True)])
def test_spilling_to_an_unencrypted_disk_prints_a_warning(
    config: PlatformConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sealed: bool | None,
    warns: bool,
) -> None:
    """It names the folder and the setting. Without information about the disk, there is no warning."""
    config.cluster.spill_folder = "/spill"
    monkeypatch.setattr(
        up, "is_protected_at_rest", lambda folder: sealed if folder == Path("/spill") else None
    )
    up.warn_of_spilling(config, up.describe(config))
    message = capsys.readouterr().out
    assert ("/spill" in message and "cluster.spill_folder=" in message) == warns


def test_start_warns_if_no_other_machine_can_join(
    config: PlatformConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operator learns it before the first join, because a change needs a new start."""
    up.warn_of_local_state(config)
    assert capsys.readouterr().out.startswith(
        "warning: A second node cannot join, because the ledger is SQLite"
    )


def test_start_is_refused_while_the_recorded_head_answers(
    config: PlatformConfig, written: ClusterRecord, listener: Callable[..., None]
) -> None:
    """The message says how to end the cluster."""
    listener(written.ports["gcs"], cluster_id=written.cluster_id)
    with pytest.raises(ClusterAlreadyUp, match=r"other settings, run `python -m cluster\.down` first"):
        up.check(config)


def test_another_clusters_head_on_the_recorded_port_does_not_count(
    config: PlatformConfig, written: ClusterRecord, listener: Callable[..., None]
) -> None:
    """After a reboot, another project's cluster may use the same port."""
    listener(written.ports["gcs"], cluster_id="another")
    with pytest.raises(PortInUse, match=r"\(gcs\)"):
        up.check(config)


def test_record_of_a_dead_cluster_does_not_block_a_start(
    config: PlatformConfig, written: ClusterRecord
) -> None:
    """With or without its folder for sockets."""
    assert up.running_record(config) is None
    ensure_private_folder(Path(written.runtime_folder))
    assert up.running_record(config) is None
    assert not Path(written.runtime_folder).exists()
    up.check(config)


def test_the_end_of_a_dead_cluster_is_recorded_once(config: PlatformConfig, written: ClusterRecord) -> None:
    """Its nodes read the event, and end. After a reboot of the head nothing else would end them."""
    for _ in range(2):
        assert up.running_record(config) is None
    [stopped] = open_ledger(config).entries(ClusterStopped)
    assert stopped.payload == {"cluster_id": written.cluster_id}


def test_a_cluster_with_other_nodes_goes_on_after_its_head_died(
    config: PlatformConfig, record: ClusterRecord
) -> None:
    """The head is repaired, and the nodes are not ended. After the last node has left, a new cluster starts."""
    head = replace(record, address="10.9.9.9", overrides=[f"storage.root={config.storage.root}"])
    write_record(head, config.storage)
    ledger = open_ledger(config)
    ledger.append(node_joined(head.cluster_id, "n"), actor="system")
    assert up.running_record(config) == head
    assert not list(ledger.entries(ClusterStopped))
    ledger.append(NodeLeft(cluster_id=head.cluster_id, node_id="n", reason="left"), actor="system")
    assert up.running_record(config) is None


def test_a_failed_start_ends_the_nodes_that_had_joined(
    config: PlatformConfig, record: ClusterRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service for nodes listens before the last part runs. A cluster without nodes needs no event."""

    def fail(config: PlatformConfig, record: ClusterRecord) -> None:
        raise StartFailed("no")

    monkeypatch.setattr(up, "_start_parts", fail)
    for name in ("check", "prepare", "warn_of_spilling"):
        monkeypatch.setattr(up, name, lambda *_: None)
    for address in ("127.0.0.1", "10.9.9.9"):
        monkeypatch.setattr(up, "describe", lambda config, address=address: replace(record, address=address))
        with pytest.raises(StartFailed):
            up.start(config)
    assert len(list(open_ledger(config).entries(ClusterStopped))) == 1


def test_cluster_with_a_running_part_is_repaired(
    config: PlatformConfig, written: ClusterRecord, part: Callable[[str], psutil.Process]
) -> None:
    """A new start would replace its head."""
    part(written.cluster_id)
    assert up.running_record(config) == written


def test_processes_of_a_killed_start_are_ended(
    config: PlatformConfig, record: ClusterRecord, part: Callable[[str], psutil.Process]
) -> None:
    write_record(replace(record, starting=True), config.storage)
    process = part(record.cluster_id)
    assert up.running_record(config) is None
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_repair_of_a_complete_cluster_is_refused(
    config: PlatformConfig, record: ClusterRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how to end the cluster."""
    running = [PartStatus(part=part, state=State.running) for part in Part]
    monkeypatch.setattr(up, "inspect_parts", lambda record: running)
    with pytest.raises(ClusterAlreadyUp, match=r"other settings, run `python -m cluster\.down` first"):
        up.repair(config, record)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folder_of_another_user_is_refused(config: PlatformConfig, record: ClusterRecord) -> None:
    """Nothing is started."""
    os.mkdir(record.runtime_folder, 0o700)
    os.chown(record.runtime_folder, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        up.prepare(config, record)


def test_state_folders_of_an_earlier_release_become_private(
    config: PlatformConfig, record: ClusterRecord
) -> None:
    """Earlier releases created the state folder, the keys and the edge's maps readable for others."""
    folders = [Path(config.storage.root) / name for name in ("", "keys", "edge")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    up.prepare(config, record)
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3


def test_production_tier_requires_another_issuer(config: PlatformConfig, record: ClusterRecord) -> None:
    """With another issuer, the development issuer's key file is not created."""
    config.tier = Tier.enterprise_gpu
    with pytest.raises(ConfigError, match="OIDC issuer"):
        up.prepare(config, record)
    config.identity.issuer.url = "https://issuer.example"
    up.prepare(config, record)
    assert not (Path(config.storage.root) / "keys" / "issuer.pem").exists()


def test_environment_has_the_clusters_own_values(
    config: PlatformConfig, record: ClusterRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another cluster's address is not inherited, Ray's own HAProxy stays off, and the token is a path."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    environment = up.environment(config, record)
    assert not {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_SERVE_ENABLE_HA_PROXY"} & environment.keys()
    assert environment[processes.ID_VARIABLE] == record.cluster_id
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == record.token_path
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert environment["RAY_gcs_storage_path"] == record.gcs_dir


def test_cluster_with_gpus_does_not_force_the_cpu(config: PlatformConfig, record: ClusterRecord) -> None:
    config.cluster.num_gpus = 1
    assert "DS_ACCELERATOR" not in up.environment(config, record)


def test_repair_keeps_the_clusters_gpus(config: PlatformConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor that a repair starts inherits the repair's environment."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    record = up.describe(config)
    for name, value in up.environment(config, record).items():
        monkeypatch.setenv(name, value)
    config.cluster.num_gpus = 1
    assert "DS_ACCELERATOR" not in up.environment(config, record)


def test_shared_overrides_compose_to_the_same_configuration(config: PlatformConfig) -> None:
    """Values with special characters of Hydra are kept."""
    config.ledger.url = (
        "postgresql+psycopg://falaj@db.example/ledger?sslmode=verify-full&sslrootcert=/etc/o'k, ca.pem"
    )
    config.ledger.checkpoint_every = 7
    config.identity.issuer.url = "https://issuer.example"
    config.features.max_ahead_s = 5.0
    config.cluster.edge_names = ["api.example.com", "10.0.0.5", "*.b.example", "fd00::2"]
    overrides = up.shared_overrides(config, up.describe(config))
    with initialize_config_module("configs", version_base=None):
        composed = load(compose("cluster", overrides=overrides), PlatformConfig)
    for section in ("ledger", "storage", "identity", "secrets", "cluster", "replica", "online", "features"):
        assert getattr(composed, section) == getattr(config, section), section


@pytest.mark.parametrize("url", ["postgresql://falaj:canary@db/l", "postgresql://falaj@db/l?password=canary"])
def test_a_password_in_the_ledgers_address_is_refused(url: str) -> None:
    """Every user can read command lines. The message does not repeat the password."""
    with pytest.raises(ValueError, match="passfile") as refused:
        LedgerConfig(url=url)
    assert "canary" not in str(refused.value)
    with pytest.raises(ConfigError, match="passfile"):
        load(OmegaConf.create({"ledger": {"url": url}}), PlatformConfig)
