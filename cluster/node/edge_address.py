"""Where the edge of a machine listens, and which names its certificate has."""

from __future__ import annotations

import ipaddress

from cluster.host.this_node import LOOPBACK_ADDRESS
from cluster.settings import ClusterConfig


def edge_hosts(config: ClusterConfig) -> list[str]:
    """Return the addresses that the edge listens on.

    Loopback is always among them, so that commands and checks on this machine reach the edge the same way everywhere.
    """
    host = config.edge_host or config.address
    return (
        [host] if ipaddress.ip_address(host).is_unspecified else list(dict.fromkeys((host, LOOPBACK_ADDRESS)))
    )


def edge_names(config: ClusterConfig) -> list[str]:
    """Return the names and addresses that the edge's certificate needs besides loopback."""
    addresses = [ipaddress.ip_address(host) for host in (config.address, *edge_hosts(config))]
    remote = (str(address) for address in addresses if not (address.is_loopback or address.is_unspecified))
    return list(dict.fromkeys((*remote, *config.edge_names)))
