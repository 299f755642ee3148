"""Headers that tell a replica about a request, and the proof that the headers come from the edge.

The values of the headers are logged with the prediction, for example its rollout, arm and unit. Any client that reaches
a replica's port could send such headers. So the sender adds a secret of this installation. The sender is the edge, or a
replica that copies a request to a shadow. The secret (`cluster.security.edge_proof`) is in a file of the cluster's user
and in HAProxy's environment, but on no command line and in no `runtime_env`. Without the secret, a replica ignores the
headers.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.records.unit_hash import as_variable, unit_key
from serve_apps.rollout.assignment import CHAMPION_VARIANT, Arm

PREFIX = "x-falaj-"
PROOF = f"{PREFIX}proof"
REQUEST_ID = f"{PREFIX}request-id"
ARRIVED = f"{PREFIX}arrived"
"""Time at which the edge had received the whole request, in microseconds since 1970."""
VARIANT = f"{PREFIX}variant"
ARM = f"{PREFIX}arm"
ROLLOUT = f"{PREFIX}rollout"
UNIT_HASH = f"{PREFIX}unit-hash"

PROOF_VARIABLE = "FALAJ_EDGE_PROOF"
"""Environment variable with the secret. HAProxy's configuration names the variable, so the file lacks the secret."""
UNIT_KEY_VARIABLE = "FALAJ_UNIT_KEY"
"""Environment variable with the key of units' hashes, in base64."""
_FIELDS = {
    REQUEST_ID: "request_id",
    VARIANT: "variant",
    ARM: "arm",
    ROLLOUT: "rollout",
    UNIT_HASH: "unit_hash",
    ARRIVED: "arrived",
}
"""From header to field of `EdgeHeaders`."""
_PROOF_FIELD = "proof"
_FIELD_OF = {name.encode(): field for name, field in (_FIELDS | {PROOF: _PROOF_FIELD}).items()}
"""From the bytes of a header's name to the field. The proof is included, so that one pass reads all headers."""


def edge_variables(proof: str) -> dict[str, str]:
    """Return HAProxy's environment variables with the installation's secret, and with what is derived from it."""
    return {PROOF_VARIABLE: proof, UNIT_KEY_VARIABLE: as_variable(unit_key(proof))}


@dataclass(kw_only=True, slots=True)  # not frozen: a frozen one takes three times as long to create
class EdgeHeaders:
    """Values of the edge's headers in one request. The defaults are for a request that did not come from the edge."""

    request_id: str = ""
    variant: str = CHAMPION_VARIANT
    arm: str = Arm.none.value
    rollout: str = ""
    """Id of the rollout. Empty if no rollout runs."""
    unit_hash: str = ""
    arrived: str = ""

    def to_headers(self, proof: str) -> dict[str, str]:
        """Return the values as request headers, with the proof. Empty values are left out."""
        values = {name: getattr(self, field) for name, field in _FIELDS.items()}
        return {PROOF: proof} | {name: value for name, value in values.items() if value}


UNPROVED = EdgeHeaders()


class EdgeHeaderReader:
    """Reads the edge's headers from requests with the proof.

    Args:
        proof: the installation's secret.
    """

    def __init__(self, proof: str) -> None:
        self._proof = proof.encode()

    def read(self, headers: Sequence[tuple[bytes, bytes]]) -> EdgeHeaders:
        """Return the headers' values, or the defaults if the proof is missing or wrong.

        Args:
            headers: headers of an ASGI scope, with names in lower case.
        """
        # Reversed, so that for a repeated header the first value is used.
        found = {_FIELD_OF[name]: value for name, value in reversed(headers) if name in _FIELD_OF}
        if not hmac.compare_digest(found.pop(_PROOF_FIELD, b""), self._proof):
            return UNPROVED
        return EdgeHeaders(**{field: value.decode("latin-1") for field, value in found.items() if value})
