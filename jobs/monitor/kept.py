"""Results that a monitoring run keeps for the next one: counts of the logs, and the figures of finished chunks.

They are JSON, encrypted with the model's key. So another principal who can write to the storage root cannot change what
the next run reports. A principal who may monitor but not write with this key keeps nothing; the next run computes all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from cluster.artifact import model_key
from cluster.errors import AccessDenied, ArtifactTampered
from cluster.security.encryption.envelope import Identity, open_bytes, seal_bytes
from cluster.security.keys.store import KeyNotFound, KeyRevoked, KeyStore
from cluster.storage import exists, read_bytes, write_bytes

FORMAT = 1
"""Part of each file. A file of another format is not used."""
_NO_VERSION = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptFiles:
    """The kept files of one model."""

    folder: str
    """The monitor's folder of the model."""
    model: str
    store: KeyStore

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a kept file. It is empty if there is none, or none that can be used.

        Args:
            name: Path relative to the folder.
        """
        uri = f"{self.folder}/{name}"
        if not exists(uri):
            return {}
        try:
            data = open_bytes(read_bytes(uri), store=self.store, key=self._key, identity=self._identity(name))
        except (ArtifactTampered, AccessDenied, KeyNotFound, KeyRevoked):
            return {}
        content: dict[str, Any] = orjson.loads(data)
        return content if content.get("format") == FORMAT else {}

    def write(self, name: str, content: dict[str, Any]) -> bool:
        """Write a kept file, completely or not at all. Return False if the caller may not use the model's key."""
        data = orjson.dumps(content | {"format": FORMAT})
        try:
            sealed = seal_bytes(data, store=self.store, key=self._key, identity=self._identity(name))
        except (AccessDenied, KeyNotFound, KeyRevoked):
            return False
        write_bytes(f"{self.folder}/{name}", sealed)
        return True

    @property
    def _key(self) -> str:
        return model_key(self.model).name

    def _identity(self, name: str) -> Identity:
        return Identity(artifact=f"monitor/{self.model}", version=_NO_VERSION, part=name)
