"""Last answers of Serve and of the issuer, stored for an edge that starts while they are down.

Replicas that are gone by then fail their health checks. Keys could be withdrawn meanwhile, so stored keys are used for
a day at most, as everywhere else while an issuer is down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from serve_apps.edge.control.files import replace_file
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.replica.targets import ScaledToZero, Target

KEYS_HOLD_S = 86_400.0
"""Seconds for which stored keys are used without a new answer of the issuer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastState:
    """The last answers; the fields are the keys of the JSON file."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    """Serve application to its replicas' addresses, or to the proxy that starts one."""
    keys: tuple[JwtKey, ...] = ()
    at: float = 0.0
    """Unix seconds of the issuer's answer."""

    @classmethod
    def read(cls, path: Path, *, now: float) -> LastState:
        """Read a file; a missing or damaged file gives the empty state."""
        try:
            content = json.loads(path.read_text())
            keys = tuple(JwtKey(**key) for key in content["keys"])
            targets = {str(name): _parse_target(stored) for name, stored in content["targets"].items()}
            at = float(content["at"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        present_keys = keys if all(Path(key.file).exists() for key in keys) else ()
        return cls(targets=targets, keys=present_keys, at=at).without_old_keys(now=now)

    def without_old_keys(self, *, now: float) -> LastState:
        """Return the state without keys, if the issuer has not confirmed them for a day."""
        return self if self.at + KEYS_HOLD_S > now else replace(self, keys=())

    def write(self, path: Path) -> None:
        """Write the state to a file.

        Raises:
            OSError: the file could not be written.
        """
        replace_file(path, json.dumps(asdict(self)).encode())


def _parse_target(stored: Any) -> Target:
    if isinstance(stored, dict):
        return ScaledToZero(tuple(map(str, stored["servers"])))
    return tuple(map(str, stored))
