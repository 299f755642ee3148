"""The installations whose bundles are imported: public keys in the folder `keys/trusted`, one file for each.

The name of the file has the name of the installation: `staging.pub.pem`. Trust is a file of this installation's owner,
not an option of the command, because everybody who may import could set an option.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster.errors import ConfigError
from cluster.ledger.checkpoint import PUBLIC_NAME, Signer, key_id, load_public_key

TRUSTED, SUFFIX = "trusted", ".pub.pem"


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """The public key of another installation."""

    name: str
    """The importer's name for the installation."""
    public: Ed25519PublicKey


def load_trusted_keys(keys: Path) -> dict[str, TrustedKey]:
    """Return the trusted keys of an installation's keys folder, by key id.

    Raises:
        ConfigError: A file is no public key, or another user can change it.
    """
    trusted: dict[str, TrustedKey] = {}
    if (keys / TRUSTED).is_dir():
        _require_own(keys / TRUSTED)
    for path in sorted((keys / TRUSTED).glob(f"*{SUFFIX}")):
        _require_own(path)
        public = load_public_key(path)
        name, other = path.name.removesuffix(SUFFIX), trusted.get(key_id(public))
        if other is not None:
            raise ConfigError(
                f"'{other.name}' and '{name}' in {keys / TRUSTED} have the same key. Remove one file."
            )
        trusted[key_id(public)] = TrustedKey(name, public)
    return trusted


def _require_own(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise ConfigError(f"Another user can change {path}. Run `chmod go-w {path}`, and check the keys.")


def own_key(signer: Signer | None) -> dict[str, TrustedKey]:
    """Return this installation's own key, so that its own bundles are recognised."""
    return {} if signer is None else {signer.key_id: TrustedKey("this installation", signer.public_key)}


def trust_advice(keys: Path) -> str:
    """Return how to trust another installation."""
    return (
        f"To trust it, have its operator confirm the key's id, then copy its keys/{PUBLIC_NAME} to "
        f"{keys / TRUSTED}/<its name>{SUFFIX}."
    )
