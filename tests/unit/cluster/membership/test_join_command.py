"""Tests of `cluster.join` and `cluster.leave` before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import join, leave
from cluster.errors import ClusterAlreadyUp, ConfigError
from cluster.join import JoinConfig, compose_node, own_settings, write_files
from cluster.ledger.events import ClusterStarted, ClusterStopped, NodeLeft
from cluster.membership.departure import has_ended, leave_membership
from cluster.membership.members import Member
from cluster.node.description import describe_machine
from cluster.node.join_checks import check_own_vault
from cluster.node.launch import remove_folders, shared_overrides
from cluster.session import ClusterRecord, write_record
from cluster.settings import (
    ClusterConfig,
    LedgerConfig,
    OnlineKind,
    PlatformConfig,
    PortsConfig,
    SecretsConfig,
    SecretsKind,
    StorageConfig,
    VaultAuth,
    VaultConfig,
)
from tests.samples.nodes import node_joined
from tests.servers.ports import free_port
from tests.unit.cluster.membership.conftest import Head

HEAD = PlatformConfig(
    storage=StorageConfig(root="s3://bucket/falaj", local="/head/.falaj"),
    ledger=LedgerConfig(url="postgresql+psycopg://falaj@10.0.0.9/ledger", checkpoint_every=7),
    cluster=ClusterConfig(
        address="10.0.0.1", region="eu-1", num_cpus=64, ports=PortsConfig(serve_http=8123, edge=9443)
    ),
)


def vault_at(address: str) -> SecretsConfig:
    """Return the settings of a cluster with its keys in Vault."""
    vault = VaultConfig(address=address, auth=VaultAuth.kubernetes, secret_file="/dev/null")
    return SecretsConfig(kind=SecretsKind.vault, vault=vault)


def overrides() -> list[str]:
    """Return the head's settings as it sends them."""
    HEAD.online.kind = OnlineKind.redis
    return shared_overrides(HEAD, describe_machine(HEAD, cluster_id="abc"))


def test_node_takes_the_clusters_settings_and_keeps_its_own() -> None:
    """Ports are shared, because Serve listens on the same ones everywhere, unless the node sets its own."""
    own = own_settings(
        ["head=10.0.0.1:8403", "token_file=t", "cluster.address='10.0.0.2'", "cluster.ports.edge=7443"]
    )
    node = compose_node({"overrides": overrides()}, own, disk="/node/state, it's")
    assert node.ledger == HEAD.ledger
    assert node.storage == StorageConfig(root="s3://bucket/falaj", local="/node/state, it's")
    assert node.online.kind is OnlineKind.redis
    assert (node.cluster.address, node.cluster.region, node.cluster.num_cpus) == ("10.0.0.2", "local", 8)
    assert (node.cluster.ports.serve_http, node.cluster.ports.edge) == (8123, 7443)


@pytest.mark.parametrize(
    "argument", ["ledger.url=sqlite:///x", "online=lmdb", "+storage.root=x", "tier=smb_cpu"]
)
def test_settings_of_the_whole_cluster_are_refused_on_a_node(argument: str) -> None:
    with pytest.raises(ConfigError, match="setting of the whole cluster"):
        own_settings([argument])


def test_login_to_vault_is_a_nodes_own_only_with_its_own_key_store() -> None:
    """Which Vault and which keys stays the head's setting, because two nodes must never use different keys."""
    login = ["secrets.vault.role=node-2", "secrets.vault.secret_file=/run/secret"]
    assert own_settings([*login, "vault=true"], vault=True) == [f"++{text}" for text in login]
    head = replace(HEAD, secrets=vault_at("https://vault:8200"))
    shared = shared_overrides(head, describe_machine(head, cluster_id="abc"))
    vault = compose_node({"overrides": shared}, own_settings(login, vault=True), disk="/d").secrets.vault
    assert (vault.address, vault.role, vault.secret_file) == ("https://vault:8200", "node-2", "/run/secret")
    with pytest.raises(ConfigError, match="needs vault=true"):
        own_settings(login)
    with pytest.raises(ConfigError, match="setting of the whole cluster"):
        own_settings(["secrets.vault.address=https://other:8200", "vault=true"], vault=True)


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        (SecretsConfig(), "needs a cluster with secrets=vault; this one has keyring"),
        (vault_at("https://127.0.0.1:8200"), "is loopback, which is another machine here"),
        (vault_at("https://vault.invalid:8200"), r"no answer.*secrets\.vault\.…"),
    ],
)
def test_own_login_to_vault_is_tried_before_anything_starts(secrets: SecretsConfig, message: str) -> None:
    """One line says what is wrong with it."""
    with pytest.raises(ConfigError, match=message):
        check_own_vault(PlatformConfig(secrets=secrets))


@pytest.fixture
def config(tmp_path: Path) -> JoinConfig:
    """Return the configuration of a machine that could join."""
    ports = PortsConfig(**{name: free_port() for name in PortsConfig.__dataclass_fields__})
    return JoinConfig(
        head="10.0.0.1:8403",
        token_file="t",
        storage=StorageConfig(root=str(tmp_path)),
        cluster=ClusterConfig(ports=ports),
    )


def test_machine_is_checked_before_the_head_is_asked(
    config: JoinConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address on loopback, one of another machine, and the keys of another cluster."""
    with pytest.raises(ConfigError, match=r"cluster\.address is loopback"):
        join.check(config)
    config.cluster.address = "192.0.2.7"
    with pytest.raises(ConfigError, match="is not an address of this machine"):
        join.check(config)
    monkeypatch.setattr(join, "require_own_address", lambda *_: None)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "issuer.pem").touch()
    with pytest.raises(ConfigError, match="has the keys of another cluster"):
        join.check(config)
    config.head = "10.0.0.1"
    with pytest.raises(ConfigError, match="head must be host:port"):
        join.check(config)


def test_folder_of_a_head_is_not_joined_with(config: JoinConfig) -> None:
    """Its record would be lost."""
    record = describe_machine(config, cluster_id="abc")
    write_record(record, config.storage)
    with pytest.raises(ClusterAlreadyUp, match="has a cluster of its own"):
        join.end_earlier_node(config)


def test_what_a_dead_node_left_does_not_stop_a_new_join(config: JoinConfig) -> None:
    """After a reboot, for example. Nothing of it runs any more."""
    record = describe_machine(config, cluster_id="abc", node_id="n", head="10.0.0.1:8403")
    write_record(record, config.storage)
    Path(record.runtime_folder).mkdir(parents=True, exist_ok=True)
    join.end_earlier_node(config)
    assert not Path(record.runtime_folder).exists()


@pytest.fixture
def record(head: Head, tmp_path: Path) -> ClusterRecord:
    """Return the record of a node that joined, with its files."""
    config = PlatformConfig(
        storage=StorageConfig(root=head.record.storage_root, local=str(tmp_path / "node"))
    )
    key, application = head.application()
    answer: dict[str, Any] = head.ask(application)
    record = replace(
        describe_machine(config, cluster_id="abc", node_id=str(answer["node_id"]), head=head.url),
        address="127.0.0.2",
    )
    write_files(record, key, answer)
    write_record(record, config.storage)
    remove_folders(record)
    return record


def test_secrets_of_a_node_are_private_and_go_with_it(head: Head, record: ClusterRecord) -> None:
    """Leaving removes the record, the certificates and what the head gave, and is an event."""
    folder = Path(record.layout.disk)
    secret = [folder / name for name in ("tls/node.key", "tls/edge.pem", "keys/ray_token")]
    assert [path.stat().st_mode & 0o777 for path in secret] == 3 * [0o600]
    assert not has_ended(head.ledger, record)
    leave_membership(record, head.config, reason="left")
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert has_ended(head.ledger, record)


def test_node_leaves_without_the_head(head: Head, record: ClusterRecord) -> None:
    """It writes to the ledger itself."""
    lost = replace(record, head=f"127.0.0.1:{free_port()}")
    leave_membership(lost, head.config, reason="down")
    [left] = head.ledger.entries(NodeLeft)
    assert (left.payload["node_id"], left.payload["reason"]) == (record.node_id, "down")


def test_node_does_not_wait_for_a_drain_without_the_head(
    head: Head, record: ClusterRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's command would wait a minute, and print a traceback."""
    lost = replace(record, ray_address=f"127.0.0.1:{free_port()}")
    leave.drain(head.config, lost, deadline_s=60)
    assert capsys.readouterr().err == (
        "warning: the head does not answer, so running work is ended without a drain\n"
    )


def test_node_learns_that_its_cluster_was_stopped(head: Head, record: ClusterRecord) -> None:
    """The event of another cluster in the same ledger does not count."""
    head.ledger.append(ClusterStopped(cluster_id="another"), actor="user:a")
    assert not has_ended(head.ledger, record)
    head.ledger.append(ClusterStopped(cluster_id="abc"), actor="user:a")
    assert has_ended(head.ledger, record)


def test_node_learns_that_its_head_started_a_new_cluster(head: Head, record: ClusterRecord) -> None:
    """After a crash of the head no event says that the old cluster was stopped. An older cluster does not count."""
    started = ClusterStarted(cluster_id="new", region="eu", num_cpus=1, num_gpus=0)
    head.ledger.append(replace(started, cluster_id="abc"), actor="user:a")
    assert not has_ended(head.ledger, record)
    head.ledger.append(started, actor="user:a")
    assert has_ended(head.ledger, record)
    later = replace(record, node_id="later")
    head.ledger.append(node_joined("abc", "later"), actor="system:head")
    assert not has_ended(head.ledger, later)


def test_a_ledger_that_does_not_answer_gives_a_warning_of_one_line(
    head: Head, record: ClusterRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLAlchemy's own message has several lines."""
    lost = replace(record, head=f"127.0.0.1:{free_port()}")
    head.config.ledger.url = "sqlite:////missing/folder/ledger.db"
    leave_membership(lost, head.config, reason="down")
    assert capsys.readouterr().err.count("\n") == 1


def test_node_is_found_by_id_name_or_address() -> None:
    """A name that several nodes have is refused, with the ids."""
    members = [
        Member(node_id=node_id, name="worker", address=address, region="eu", certificate="", joined_at="")
        for node_id, address in (("n1", "10.0.0.2"), ("n2", "10.0.0.3"))
    ]
    assert leave.find_member(members, "n2") == leave.find_member(members, "10.0.0.3") == members[1]
    hiding = replace(members[0], name="n2")
    assert leave.find_member([hiding, members[1]], "n2") == members[1]
    with pytest.raises(ConfigError, match=r"Several nodes are named 'worker'.*n1 .*n2 "):
        leave.find_member(members, "worker")
    with pytest.raises(ConfigError, match="No node is named 'x'"):
        leave.find_member(members, "x")
    with pytest.raises(ConfigError, match="No other machine is a node"):
        leave.find_member([], "x")
