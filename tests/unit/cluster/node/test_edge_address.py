"""Where an edge listens, and which names its certificate has."""

from __future__ import annotations

import pytest

from cluster.node.edge_address import edge_hosts, edge_names
from cluster.settings import ClusterConfig
from serve_apps.edge.__main__ import bind_address


@pytest.mark.parametrize(
    ("options", "hosts", "names"),
    [
        ({}, ["127.0.0.1"], []),
        ({"address": "10.0.0.1"}, ["10.0.0.1", "127.0.0.1"], ["10.0.0.1"]),
        ({"edge_host": "10.0.0.5"}, ["10.0.0.5", "127.0.0.1"], ["10.0.0.5"]),
        ({"edge_host": "0.0.0.0", "edge_names": ["a.example"]}, ["0.0.0.0"], ["a.example"]),  # noqa: S104
        ({"edge_host": "::"}, ["::"], []),
        ({"address": "10.0.0.1", "edge_host": "127.0.0.1"}, ["127.0.0.1"], ["10.0.0.1"]),
        (
            {"address": "10.0.0.1", "edge_host": "fd00::2", "edge_names": ["10.0.0.1", "a.example"]},
            ["fd00::2", "127.0.0.1"],
            ["10.0.0.1", "fd00::2", "a.example"],
        ),
    ],
)
def test_edge_listens_on_its_address_and_on_loopback(
    options: dict[str, object], hosts: list[str], names: list[str]
) -> None:
    """By default on loopback only; its certificate has every address but an unspecified one."""
    config = ClusterConfig(**options)  # type: ignore[arg-type]
    assert (edge_hosts(config), edge_names(config)) == (hosts, names)


@pytest.mark.parametrize(
    "options",
    [
        {"edge_host": "edge"},
        {"edge_host": "10.0.0"},
        {"edge_names": ["a b"]},
        {"edge_names": ["https://a"]},
        {"edge_names": [""]},
        {"edge_names": ["a,b"]},
    ],
)
def test_what_is_no_address_or_name_is_refused(options: dict[str, object]) -> None:
    """The message names the option and the value."""
    (option,) = options
    with pytest.raises(ValueError, match=rf"cluster\.{option}.*got '"):
        ClusterConfig(**options)  # type: ignore[arg-type]


def test_haproxy_gets_ipv6_addresses_in_brackets() -> None:
    assert [bind_address(host, 1) for host in ("10.0.0.1", "fd00::2")] == ["10.0.0.1:1", "[fd00::2]:1"]
