"""Host names and addresses in the configuration."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")


def is_address(text: str) -> bool:
    """Return whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback_host(host: str) -> bool:
    """Return whether a client of a host reaches its own machine: `localhost`, a name below it, or such an address."""
    if is_address(host):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def require_edge_names(host: str | None, names: Iterable[str]) -> None:
    """Require that `cluster.edge_host` is an address, and that `cluster.edge_names` are host names or addresses.

    Raises:
        ValueError: A value is neither.
    """
    if host is not None and not is_address(host):
        raise ValueError(f"cluster.edge_host must be an address such as 10.0.0.1, got '{host}'.")
    for name in names:
        if not (_HOST_NAME.fullmatch(name) or is_address(name)):
            raise ValueError(
                f"cluster.edge_names takes host names and addresses such as [api.example.com], got '{name}'."
            )


def require_redis_url(section: str, url: str) -> None:
    """Require that `<section>.url` is a URL of Redis without a password.

    Raises:
        ValueError: It is not.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError(f"{section}.url must begin with redis:// or rediss://.")
    if parts.password:
        raise ValueError(
            f"{section}.url holds a password. Put it in a file that only you can read, and set {section}.password_file."
        )
