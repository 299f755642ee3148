"""Checks of a machine before parts of a cluster start on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from cluster.errors import CompilerMissing, ConfigError, PortInUse
from cluster.host import processes
from cluster.node.edge_address import edge_hosts
from cluster.settings import ClusterConfig

REFUSED_VARIABLES = (
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
)
"""Environment variables that let a Parquet file's metadata run code (CVE-2026-41486)."""


def refuse_variables() -> None:
    """Refuse environment variables that let data run code. Every process of the cluster inherits the environment.

    Raises:
        ConfigError: One of `REFUSED_VARIABLES` is set.
    """
    for name in REFUSED_VARIABLES:
        if name in os.environ:
            raise ConfigError(f"{name} is set: it lets a Parquet file run code. Unset it.")


def require_compiler() -> None:
    """Require a C++ compiler.

    Raises:
        CompilerMissing: None is installed.
    """
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise CompilerMissing(
            "No C++ compiler (c++) found; DeepSpeed compiles an operator at start. Install g++."
        )


def require_own_address(option: str, address: str) -> None:
    """Require that this machine has the address in an option.

    Raises:
        ConfigError: It has not.
    """
    if not processes.port_is_free(0, address):
        raise ConfigError(f"{option}={address} is not an address of this machine. `ip address` lists them.")


def require_free_ports(ports: Mapping[str, int], config: ClusterConfig) -> None:
    """Require that nothing uses the ports.

    Args:
        ports: Ports by name.
        config: The machine's addresses.

    Raises:
        PortInUse: Ports are in use. The message names all of them.
    """
    taken = {name: port for name, port in ports.items() if _is_taken(name, port, config)}
    if len(taken) == 1:
        [(name, port)] = taken.items()
        raise PortInUse(
            f"Port {port} ({name}) is in use by {processes.listener_name(port)}. Free it, or set "
            f"cluster.ports.{name}=…"
        )
    if taken:
        uses = ", ".join(
            f"{port} ({name}) by {processes.listener_name(port)}" for name, port in taken.items()
        )
        options = " ".join(f"cluster.ports.{name}=…" for name in taken)
        raise PortInUse(f"Ports are in use: {uses}. Free them, or set {options}")


def _is_taken(name: str, port: int, config: ClusterConfig) -> bool:
    if name == "replicas":
        # Connections of a replica that just ended block its port for a minute. Ray then takes another of the 1,000.
        return processes.port_answers(port)
    hosts = {
        "gcs": ["0.0.0.0"],  # noqa: S104 (Ray's GCS listens on every address)
        "nodes": [config.address],
        "serve_http": [config.address],
        "edge": edge_hosts(config),
    }
    return not all(processes.port_is_free(port, host) for host in hosts.get(name, ["127.0.0.1"]))
