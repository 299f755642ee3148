"""What Serve and the issuer said last, for an edge that starts while they cannot be asked.

Replicas that are gone by then fail their health checks. Keys that may have been taken away meanwhile are believed for
a day, as everywhere where an issuer is down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from serve_apps.edge.control.files import replace_file
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.replica.targets import Target, Waker

KEYS_HOLD_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Last:
    """The last answers."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    """Serve application to its replicas' addresses, or who wakes it."""
    keys: tuple[JwtKey, ...] = ()
    at: float = 0.0
    """Unix seconds."""

    @classmethod
    def read(cls, path: Path, *, now: float) -> Last:
        """What lies in a file; nothing where none does, or one that cannot be understood."""
        try:
            content = json.loads(path.read_text())
            keys = tuple(JwtKey(**key) for key in content["keys"])
            targets = {str(name): _target(stated) for name, stated in content["targets"].items()}
            at = float(content["at"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        kept = keys if all(Path(key.file).exists() for key in keys) else ()
        return cls(targets=targets, keys=kept, at=at).believed(now=now)

    def believed(self, *, now: float) -> Last:
        """The same, without keys that nobody has confirmed for a day."""
        return self if self.at + KEYS_HOLD_S > now else replace(self, keys=())

    def write(self, path: Path) -> None:
        """Keep it.

        Raises:
            OSError: the file could not be written.
        """
        replace_file(path, json.dumps(asdict(self)).encode())


def _target(stated: Any) -> Target:
    if isinstance(stated, dict):
        return Waker(tuple(map(str, stated["servers"])))
    return tuple(map(str, stated))
