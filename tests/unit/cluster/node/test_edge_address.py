"""Tests of the addresses that the edge listens on, and of the names in its certificate."""

from __future__ import annotations

import pytest

from cluster.node.edge_address import edge_hosts, edge_names
from cluster.settings import ClusterConfig
from serve_apps.edge.__main__ import bind_address

NAMES = ["api.example.com"]


@pytest.mark.parametrize(
    ("host", "hosts", "names"),
    [
        (None, ["127.0.0.1"], NAMES),
        ("127.0.0.1", ["127.0.0.1"], NAMES),
        ("10.0.0.1", ["10.0.0.1", "127.0.0.1"], ["10.0.0.1", *NAMES]),
        ("0.0.0.0", ["0.0.0.0"], NAMES),  # noqa: S104 (what is tested)
    ],
)
def test_edge_listens_on_loopback_besides_its_address(
    host: str | None, hosts: list[str], names: list[str]
) -> None:
    """The certificate has the address, but a certificate for all addresses has only the configured names."""
    config = ClusterConfig(edge_host=host, edge_names=NAMES)
    assert (edge_hosts(config), edge_names(config)) == (hosts, names)


def test_haproxy_gets_an_ipv6_address_in_brackets() -> None:
    """HAProxy separates address and port at the last colon."""
    assert [bind_address(host, 8443) for host in ("10.0.0.1", "::")] == ["10.0.0.1:8443", "[::]:8443"]
