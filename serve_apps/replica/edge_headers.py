"""What the edge tells a replica about a request, and the proof without which a replica believes none of it.

The edge's headers end up in the log of record: which rollout, arm and unit a prediction belongs to. Anybody who reaches
a replica's port could write such headers. So whoever sends them (the edge, and a replica that copies a request to a
shadow) adds a secret of this installation. It lies in a file of the cluster's user, and in HAProxy's environment, but
on no command line and in no `runtime_env`.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.security.private_file import read_secret_file
from cluster.security.tokens.issuer import write_private
from cluster.storage import Layout, local
from serve_apps.rollout.assignment import CHAMPION_VARIANT, Arm

PREFIX = "x-falaj-"
PROOF = f"{PREFIX}proof"
REQUEST_ID = f"{PREFIX}request-id"
ARRIVED = f"{PREFIX}arrived"
"""Microseconds since 1970 at which the edge had the whole request."""
VARIANT = f"{PREFIX}variant"
ARM = f"{PREFIX}arm"
ROLLOUT = f"{PREFIX}rollout"
UNIT_HASH = f"{PREFIX}unit-hash"

PROOF_VARIABLE = "FALAJ_EDGE_PROOF"
"""By which HAProxy's configuration names the secret, so that its file does not hold it."""
_FILE = "edge_proof"
_FIELDS = {
    REQUEST_ID: "request_id",
    VARIANT: "variant",
    ARM: "arm",
    ROLLOUT: "rollout",
    UNIT_HASH: "unit_hash",
    ARRIVED: "arrived",
}
"""Header to field of `EdgeHeaders`."""
_READ = {name.encode(): field for name, field in _FIELDS.items()}
_PROOF = PROOF.encode()


def edge_proof(places: Layout) -> str:
    """The installation's secret. The first process that asks makes it; every later one reads the same.

    Raises:
        ConfigError: other users can read the file.
    """
    path = local(places.keys) / _FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = path.with_name(f".{_FILE}.{uuid.uuid4().hex}")
        write_private(new, secrets.token_hex(32).encode())
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(new, path)
        new.unlink()
    return read_secret_file(path, what="the secret that the edge proves itself to replicas with")


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeHeaders:
    """What the edge said about one request; the defaults are those of a request that came past it."""

    request_id: str = ""
    variant: str = CHAMPION_VARIANT
    arm: str = Arm.none.value
    rollout: str = ""
    """Empty outside any rollout."""
    unit_hash: str = ""
    arrived: str = ""

    def sent(self, proof: str) -> dict[str, str]:
        """As headers of a request, with the proof; what is empty is left out."""
        values = {name: getattr(self, field) for name, field in _FIELDS.items()}
        return {PROOF: proof} | {name: value for name, value in values.items() if value}


UNPROVED = EdgeHeaders()


class EdgeHeaderReader:
    """Reads the edge's headers of requests that prove that they are the edge's.

    Args:
        proof: the installation's secret.
    """

    def __init__(self, proof: str) -> None:
        self._proof = proof.encode()

    def read(self, headers: Sequence[tuple[bytes, bytes]]) -> EdgeHeaders:
        """What the edge said; the defaults where the proof is missing or wrong.

        Args:
            headers: of an ASGI scope: names in lower case.
        """
        given = dict(reversed(headers))  # of two with one name the first counts
        if not hmac.compare_digest(given.get(_PROOF, b""), self._proof):
            return UNPROVED
        said = {field: value.decode("latin-1") for name, field in _READ.items() if (value := given.get(name))}
        return EdgeHeaders(**said)
