"""Rotate the key-encryption key, or revoke a key. Only for admins.

    python -m cluster.security.manage_keys action=rotate_kek
    python -m cluster.security.manage_keys action=revoke key=features/v/personal confirm=features/v/personal

`rotate_kek` encrypts the keyring under a new key-encryption key while the broker keeps running. `revoke` destroys every
version of a key: all data under that key is lost, also in backups. To give a view's keys new versions, run
`python -m feature_jobs.rotate_keys`.
"""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import KeyEncryptionKeyRotated, KeyRevocation, Subject
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.keys.keyring import rotate_local_kek
from cluster.security.keys.store import KeyRevoked, KeyStore
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig, SecretsKind
from cluster.storage import layout, local

ENTRYPOINT = "cluster.security.manage_keys"


class KeyAction(enum.Enum):
    """Action of this command."""

    rotate_kek = "rotate_kek"
    revoke = "revoke"


@dataclass(kw_only=True, slots=True)
class ManageKeysConfig(PlatformConfig):
    """Configuration of this command: the action, and the key for `revoke`."""

    action: KeyAction = KeyAction.rotate_kek
    key: str | None = None
    """Name of the key to revoke."""
    confirm: str | None = None
    """The same name again, because a revocation cannot be undone."""

    def __post_init__(self) -> None:
        if self.action is KeyAction.revoke and self.key is None:
            raise ValueError("action=revoke needs the name of a key: key=….")
        if self.action is KeyAction.revoke and self.confirm != self.key:
            raise ValueError(
                f"Revoking key '{self.key}' destroys all data under it, also in backups. To confirm, add "
                f"confirm={self.key}."
            )


@job("manage_keys", ManageKeysConfig)
def main(config: ManageKeysConfig) -> None:
    """Run the action with the rights of the caller."""
    if config.action is KeyAction.rotate_kek:
        refuse_unused(("key", "confirm"), by="action=rotate_kek")
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint=ENTRYPOINT)
    ledger.require_known(Subject.key)
    match config.action:
        case KeyAction.rotate_kek:
            count = rotate_kek(config, ledger, actor)
            print(f"{count} keys are now under a new key-encryption key")
        case KeyAction.revoke:
            revoke(str(config.key), key_store(actor.access), ledger, actor)
            print(f"key {config.key} is revoked")


def rotate_kek(config: PlatformConfig, ledger: Ledger, actor: Actor) -> int:
    """Encrypt the keyring with a new key-encryption key, and return the number of keys in the keyring.

    Raises:
        ConfigError: the keys are in Vault, or under a passphrase.
        AccessDenied: the caller may not manage keys.
    """
    if config.secrets.kind is not SecretsKind.keyring or config.secrets.passphrase_file is not None:
        raise ConfigError(
            "action=rotate_kek needs a keyring whose key-encryption key is in a file. Vault rotates its own keys, and "
            "the key of a keyring under a passphrase cannot be rotated."
        )
    actor.check(Action.manage_keys, Resource(kind="key", name="keyring", region=config.cluster.region))
    count = len(rotate_local_kek(local(layout(config.storage).keys)).names())
    ledger.append(KeyEncryptionKeyRotated(num_keys=count), actor=actor.name)
    return count


def revoke(name: str, store: KeyStore, ledger: Ledger, actor: Actor) -> None:
    """Destroy a key.

    The event is written before the key is destroyed, so that the ledger records every lost key. After an interruption,
    it can be repeated.

    Raises:
        AccessDenied, KeyNotFound, KeyRevoked: the caller may not manage the key, or the key store refuses it.
    """
    with contextlib.suppress(KeyRevoked):  # `store.revoke` completes the revocation or raises this
        info = store.info(name)
        actor.check(Action.manage_keys, Resource.from_key(info))
        ledger.append(KeyRevocation(name=name, described=info.plain()), actor=actor.name)
    store.revoke(name)


if __name__ == "__main__":
    main()
