"""Last answers of Serve and of the issuer, stored for an edge that starts while one of them is down.

Replicas that do not exist any more fail their health checks. The issuer may withdraw keys meanwhile, so stored keys are
used for at most a day. Other processes use the same limit while an issuer is down.
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
"""Stored keys are used for this many seconds after the issuer's last answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastState:
    """The last answers. The fields are the keys of the JSON file."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    """From the name of a Serve application to its replicas' addresses, or to Serve's proxy, which starts a replica."""
    keys: tuple[JwtKey, ...] = ()
    at: float = 0.0
    """Time of the issuer's last answer, Unix seconds."""

    @classmethod
    def read(cls, path: Path, *, now: float) -> LastState:
        """Read the state from a file. If the file is missing or damaged, return the empty state."""
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
        """Return the state. If the issuer's last answer is more than a day old, return it without keys."""
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
