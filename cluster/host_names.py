"""Host names and addresses in the configuration."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")


def is_address(text: str) -> bool:
    """Return whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def require_addresses(option: str, texts: Iterable[str]) -> None:
    """Require IP addresses.

    Raises:
        ValueError: One of them is not an IP address.
    """
    for text in texts:
        if not is_address(text):
            raise ValueError(f"{option} must be an address such as 10.0.0.1, got '{text}'.")


def require_host_names(option: str, texts: Iterable[str]) -> None:
    """Require host names and IP addresses.

    Raises:
        ValueError: One of them is neither.
    """
    for text in texts:
        if not (_HOST_NAME.fullmatch(text) or is_address(text)):
            raise ValueError(
                f"{option} takes host names and addresses such as [api.example.com], got '{text}'."
            )
