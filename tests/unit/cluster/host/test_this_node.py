"""Tests of paths that arrive at another node than the one they come from."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.host.this_node import RECORD_VARIABLE, forget_node, is_loopback, this_node
from cluster.node.description import describe_machine
from cluster.placement import PlacementConfig, find_nodes, options
from cluster.security.keys import access as key_access
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.source import TokenSource
from cluster.session import ClusterRecord, find_record
from cluster.settings import ClusterConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout, layout
from tests.processes.commands import run_main

ROOT = "s3://bucket/falaj"
SENT = Layout(ROOT, "/head/.falaj")
"""A layout as the head has it."""


@pytest.fixture
def record(tmp_path: Path) -> ClusterRecord:
    """Return the record of a node that joined the cluster `abc`."""
    config = PlatformConfig(
        storage=StorageConfig(root=ROOT, local=str(tmp_path)), cluster=ClusterConfig(address="10.0.0.2")
    )
    return describe_machine(config, cluster_id="abc", node_id="n2", head="10.0.0.1:8403")


def run_as_part_of(record: ClusterRecord, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the environment of a node's processes."""
    path = folder / "cluster.json"
    path.write_text(json.dumps(asdict(record)))
    monkeypatch.setenv(RECORD_VARIABLE, str(path))


def arrived(value: object) -> object:
    """Return a value as another process receives it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 (own data)


def test_folders_of_another_node_become_this_nodes(
    record: ClusterRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared root stays. It holds for layouts that are sent, and for configurations."""
    run_as_part_of(record, tmp_path, monkeypatch)
    assert arrived(SENT) == Layout(ROOT, str(tmp_path))
    assert layout(StorageConfig(root=ROOT, local="/head/.falaj")) == Layout(ROOT, str(tmp_path))
    found = find_record(StorageConfig(root=ROOT, local="/head/.falaj"))
    assert found is not None
    assert found.node_id == "n2"


def test_folders_of_other_clusters_and_single_machines_stay(
    record: ClusterRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a record, and with a damaged one."""
    assert arrived(SENT) == SENT
    run_as_part_of(replace(record, storage_root="s3://other"), tmp_path, monkeypatch)
    assert arrived(SENT) == SENT
    run_as_part_of(replace(record, address="127.0.0.1"), tmp_path, monkeypatch)
    assert arrived(SENT) == SENT
    (tmp_path / "cluster.json").write_text("{")
    assert arrived(SENT) == SENT
    assert this_node() is None


@pytest.mark.parametrize(("node_id", "asks_head"), [("n2", True), (None, False)])
def test_job_on_another_node_uses_its_own_socket_and_token(
    record: ClusterRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    node_id: str | None,
    asks_head: bool,
) -> None:
    """A node that joined asks the head for the intent, once in a while. The head reads its file."""
    asked: list[dict[str, object]] = []

    def ask(path: Path, request: dict[str, object]) -> str:
        asked.append(request)
        return "token of the head"

    monkeypatch.setattr(key_access, "ask_broker", ask)
    key_access._fetched.cache_clear()
    run_as_part_of(replace(record, node_id=node_id), tmp_path, monkeypatch)
    token = TokenSource(intent=f"job-{tmp_path.name}.jwt", root="/head/.falaj")
    access = KeyAccess(socket="/head/s", token=token, root="/head/.falaj", cluster_id="abc")
    here = access.here()
    assert (here.socket, here.root) == (record.key_socket, str(tmp_path))
    intents = tmp_path / "keys" / "intents"
    assert here.token.path() == intents / token.intent
    if not asks_head:
        intents.mkdir(parents=True)
        (intents / token.intent).write_text("token of the file")
        (intents / token.intent).chmod(0o600)
    read = access.token_reader()
    assert [read(), read()] == 2 * ["token of the head" if asks_head else "token of the file"]
    assert asked == ([{"op": "intent", "name": token.intent}] if asks_head else [])


def test_replica_on_another_node_gets_its_token_from_the_head(
    record: ClusterRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The development issuer's private key is not there."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(key_access, "ask_broker", lambda path, request: asked.append(request) or "token")
    key_access._fetched.cache_clear()
    run_as_part_of(record, tmp_path, monkeypatch)
    token = TokenSource(root="/head/.falaj", subject="service:loan", purpose="credit_scoring")
    access = KeyAccess(socket="/head/s", token=token, cluster_id="abc")
    assert access.token_reader()() == "token"
    assert asked == [{"op": "service_token", "subject": "service:loan", "purpose": "credit_scoring"}]
    elsewhere = replace(access, cluster_id="another")
    assert elsewhere.here() == elsewhere


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1", True), ("127.8.0.1", True), ("10.0.0.1", False)]
)
def test_loopback_addresses(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


NODES = [
    {"Alive": True, "Labels": {"ray.io/availability-region": "one", "ray.io/node-id": "a"}},
    {"Alive": True, "Labels": {"ray.io/availability-region": "two", "ray.io/node-id": "b"}},
    {"Alive": False, "Labels": {"ray.io/availability-region": "gone", "ray.io/node-id": "c"}},
]


class Context:
    """Ray's runtime context on node `a`."""

    def get_node_id(self) -> str:
        return "a"


def test_work_is_bound_to_its_region_or_refused(
    record: ClusterRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would wait forever for a label that no node has. A dead node does not count."""
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    monkeypatch.setattr("ray.get_runtime_context", Context)
    assert find_nodes(PlacementConfig(), on_this_node="its disk") == {}
    assert options(find_nodes(PlacementConfig())) == {}
    two = find_nodes(PlacementConfig(region="two"))
    assert options(two) == {"label_selector": {"ray.io/availability-region": "two"}}
    with pytest.raises(ConfigError, match=r"no node is in this region\. Regions of nodes: one, two\."):
        find_nodes(PlacementConfig(region="gone"))
    run_as_part_of(record, tmp_path, monkeypatch)
    disk = find_nodes(PlacementConfig(region="one"), on_this_node="its disk")
    assert disk == {"ray.io/availability-region": "one", "ray.io/node-id": "a"}
    with pytest.raises(ConfigError, match="only, because its disk, and this node is in another region"):
        find_nodes(PlacementConfig(region="two"), on_this_node="its disk")


def test_a_new_cluster_does_not_take_the_folders_of_a_running_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell that starts it may have the other node's record in its environment."""
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "other" / "cluster.json"))
    forget_node()
    assert RECORD_VARIABLE not in os.environ


@job("platform", PlatformConfig)
def print_disk(config: PlatformConfig) -> None:
    """Print the folder of this machine's own state."""
    print(layout(config.storage).disk)


def test_folder_on_the_command_line_wins_over_the_nodes(
    record: ClusterRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, to look at a second node of the same machine. Workers still take their own node's folder."""
    run_as_part_of(record, tmp_path, monkeypatch)
    root = f"storage.root={ROOT}"
    assert run_main(print_disk, root, "storage.local=/other").stdout == "/other\n"
    run_as_part_of(record, tmp_path, monkeypatch)
    assert run_main(print_disk, root, f"storage.local={tmp_path}").stdout == f"{tmp_path}\n"
    assert run_main(print_disk, root).stdout == f"{tmp_path}\n"
    assert arrived(SENT) == Layout(ROOT, str(tmp_path))
