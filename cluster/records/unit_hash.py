"""The hash of a unit in access records and prediction records.

It is keyed, because units are often small numbers: with a plain hash, anybody who reads a record could try them all.
Each rollout has its own key, so records of different rollouts cannot be joined by their units. All edges have the same
keys: they are derived from the secret that each node has (`edge_proof`). The edge computes the same hashes with
HAProxy's converter `hmac`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

NO_ROLLOUT = "none"
"""Stands for the rollout's id in the key while no rollout runs."""
DIGITS = 16
_LABEL = b"falaj unit hash"


def unit_key(proof: str) -> bytes:
    """Return the installation's key, from which the key of each rollout is derived.

    Args:
        proof: The secret that all nodes have; see `cluster.security.edge_proof`.
    """
    return _mac(proof.encode(), _LABEL)


def as_variable(key: bytes) -> str:
    """Return a key as HAProxy reads it: base64."""
    return base64.b64encode(key).decode()


def unit_hash(key: bytes, *, rollout: str, unit: bytes) -> str:
    """Return the hash of a unit, as 16 upper-case hexadecimal digits.

    Args:
        key: The installation's key.
        rollout: Id of the rollout; empty if none runs.
        unit: Raw bytes of the unit.
    """
    of_rollout = _mac(key, (rollout or NO_ROLLOUT).encode())
    return _mac(of_rollout, unit).hex().upper()[:DIGITS]


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()
