"""Tests of a node with its own login to Vault. Vault is a double."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import AccessDenied
from cluster.ledger import open_ledger
from cluster.ledger.events import AccessDecided
from cluster.membership.head_client import HeadClient
from cluster.membership.relay import Relay, own_keys
from cluster.node.description import describe_machine
from cluster.security.keys.broker import Broker
from cluster.security.keys.client import BrokerKeyStore, ask_broker
from cluster.security.keys.configured import open_store
from cluster.security.keys.store import KeyInfo, KeyStoreUnavailable
from cluster.security.tls.certificates import ensure_tls
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord
from cluster.settings import (
    ClusterConfig,
    IdentityConfig,
    LedgerConfig,
    PlatformConfig,
    SecretsConfig,
    SecretsKind,
    StorageConfig,
    VaultConfig,
)
from tests.servers.polling import wait_until
from tests.servers.ports import free_port
from tests.servers.vault_double import VaultDouble

KEY = KeyInfo(name="features/people/personal", column_class="personal", purposes=("credit",), region="eu")


@pytest.fixture
def vault() -> Iterator[VaultDouble]:
    with VaultDouble() as double:
        double.state.approles["node-2"] = "the node's secret id"
        yield double


@pytest.fixture
def node(tmp_path: Path, vault: VaultDouble) -> tuple[PlatformConfig, ClusterRecord]:
    """Return configuration and record of a node in region eu, in production."""
    secret = tmp_path / "secret-id"
    secret.touch(mode=0o600)
    secret.write_text("the node's secret id")
    config = PlatformConfig(
        storage=StorageConfig(root="memory://own-vault", local=str(tmp_path)),
        ledger=LedgerConfig(url=f"sqlite:///{tmp_path}/ledger.db"),
        cluster=ClusterConfig(region="eu"),
        identity=IdentityConfig(environment="production"),
        secrets=SecretsConfig(
            kind=SecretsKind.vault,
            vault=VaultConfig(address=vault.address, role="node-2", secret_file=str(secret)),
        ),
    )
    record = describe_machine(config, cluster_id="abc", node_id="n2", head=f"127.0.0.1:{free_port()}")
    (tmp_path / "run").mkdir(mode=0o700)
    record = replace(record, own_vault=True, key_socket=str(tmp_path / "run" / "s"))
    ensure_issuer(record.layout)
    ensure_tls(record.layout)
    return config, record


@pytest.fixture
def socket(node: tuple[PlatformConfig, ClusterRecord]) -> Iterator[Path]:
    """Run the node's broker. Its head does not answer. Yield the path of its socket."""
    config, record = node
    stopped, path = threading.Event(), Path(record.key_socket)

    def serve() -> None:
        with own_keys(config, record, stopped=stopped) as keys:
            Broker(Relay(HeadClient.of(record), keys=keys), path).run(stopped)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        wait_until(path.exists)
        yield path
    finally:
        stopped.set()
        thread.join(10)


def store(socket: Path, record: ClusterRecord, role: Role, purpose: str = "credit") -> BrokerKeyStore:
    token = mint_token(record.layout, subject=f"user:{role.value}", role=role, purpose=purpose)
    return BrokerKeyStore(socket, lambda: token)


def create_key(config: PlatformConfig, info: KeyInfo = KEY) -> None:
    """Create a key in Vault, as the head does."""
    stopped = threading.Event()
    try:
        open_store(config, stopped=stopped).ensure(info)
    finally:
        stopped.set()


def test_keys_come_from_vault_while_the_head_is_down(
    socket: Path, node: tuple[PlatformConfig, ClusterRecord]
) -> None:
    """The node decides by the same policies, in its own region. Another login to Vault reads the same key."""
    config, record = node
    admin, scientist = store(socket, record, Role.admin), store(socket, record, Role.data_scientist)
    create_key(config)
    wrapped = admin.wrap(KEY.name, b"a secret")
    assert scientist.unwrap(KEY.name, wrapped) == b"a secret"
    stopped = threading.Event()
    try:
        assert open_store(config, stopped=stopped).unwrap(KEY.name, wrapped) == b"a secret"
    finally:
        stopped.set()
    with pytest.raises(KeyStoreUnavailable, match="head's service for nodes"):
        ask_broker(socket, {"op": "intent", "name": f"jobs.train-{'0' * 32}.jwt"})


def test_policies_hold_on_the_node(socket: Path, node: tuple[PlatformConfig, ClusterRecord]) -> None:
    """Another purpose, and data that belongs to another region, get nothing. Denials are in the ledger."""
    config, record = node
    admin = store(socket, record, Role.admin)
    create_key(config)
    wrapped = admin.wrap(KEY.name, b"a secret")
    with pytest.raises(AccessDenied):
        store(socket, record, Role.data_scientist, purpose="marketing").unwrap(KEY.name, wrapped)
    denied = [entry.payload for entry in open_ledger(config).entries(AccessDecided)]
    assert [event["allowed"] for event in denied if event["action"] == "unwrap_key"] == [False]
    create_key(config, replace(KEY, name="features/others/personal", region="us"))
    with pytest.raises(AccessDenied):
        admin.wrap("features/others/personal", b"a secret")


def test_only_the_head_changes_keys(socket: Path, node: tuple[PlatformConfig, ClusterRecord]) -> None:
    """So no two brokers change a key's description at once, and the node's login needs no right to change keys."""
    config, record = node
    create_key(config)
    admin = store(socket, record, Role.admin)
    changes: list[Callable[[], object]] = [
        lambda: admin.ensure(replace(KEY, column_class="public")),
        lambda: admin.rotate(KEY.name),
        lambda: admin.revoke(KEY.name),
    ]
    for change in changes:
        with pytest.raises(KeyStoreUnavailable, match="head's service for nodes"):  # it is down
            change()
    assert admin.info(KEY.name) == KEY
