"""`python -m cluster.security.manage_keys action=rotate_kek`, `action=revoke key=features/v/personal confirm=…`.

For who manages keys (admin). `rotate_kek` puts the keyring under a new key-encryption key; the broker goes on. `revoke`
destroys a key with all its versions: what it protected is gone for good, in every backup too. A view's keys are given
new versions by `python -m feature_jobs.rotate_keys`.
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
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.keys.keyring import rotate_local_kek
from cluster.security.keys.store import KeyRevoked, KeyStore
from cluster.session import require_record
from cluster.settings import PlatformConfig, SecretsKind
from cluster.storage import layout, local

ENTRYPOINT = "cluster.security.manage_keys"


class KeyAction(enum.Enum):
    """What to do."""

    rotate_kek = "rotate_kek"
    revoke = "revoke"


@dataclass(kw_only=True, slots=True)
class ManageKeysConfig(PlatformConfig):
    """What to do, and with which key."""

    action: KeyAction = KeyAction.rotate_kek
    key: str | None = None
    """To revoke."""
    confirm: str | None = None
    """The key's name once more: there is no way back."""

    def __post_init__(self) -> None:
        if self.action is KeyAction.revoke and self.key is None:
            raise ValueError("Say which key to revoke: key=….")
        if self.action is KeyAction.revoke and self.confirm != self.key:
            raise ValueError(
                f"What is under key '{self.key}' will be gone for good, in every backup too. If that is meant, add "
                f"confirm={self.key}."
            )


@job("manage_keys", ManageKeysConfig)
def main(config: ManageKeysConfig) -> None:
    """Do it, as who may."""
    if config.action is KeyAction.rotate_kek:
        refuse_unused(("key", "confirm"), by="action=rotate_kek")
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint=ENTRYPOINT)
    ledger.require_known(Subject.key)
    match config.action:
        case KeyAction.rotate_kek:
            count = rotate_kek(config, ledger, actor)
            print(f"{count} keys are under a new key-encryption key")
        case KeyAction.revoke:
            revoke(str(config.key), key_store(actor.access), ledger, actor)
            print(f"key {config.key} is revoked")


def rotate_kek(config: PlatformConfig, ledger: Ledger, actor: Actor) -> int:
    """Give the keyring a new key-encryption key; how many keys it has.

    Raises:
        ConfigError: the keys are in Vault, or under a passphrase.
        AccessDenied: for who does not manage keys.
    """
    if config.secrets.kind is not SecretsKind.keyring or config.secrets.passphrase_file is not None:
        raise ConfigError(
            "Only a keyring whose key-encryption key lies in a file can be given another one here. Vault rotates its "
            "own; a keyring under a passphrase keeps that."
        )
    actor.check(Action.manage_keys, Resource(kind="key", name="keyring", region=config.cluster.region))
    count = len(rotate_local_kek(local(layout(config.storage).keys)).names())
    ledger.append(KeyEncryptionKeyRotated(num_keys=count), actor=actor.name)
    return count


def revoke(name: str, store: KeyStore, ledger: Ledger, actor: Actor) -> None:
    """Destroy a key. What is about to happen is said first, so that no key is gone that nobody knows of; and it can be
    asked for again where a store was cut off in between.

    Raises:
        AccessDenied, KeyNotFound, KeyRevoked: as the key store says.
    """
    with contextlib.suppress(KeyRevoked):  # the store says whether there is anything left to do
        info = store.info(name)
        actor.check(Action.manage_keys, Resource.of_key(info))
        ledger.append(KeyRevocation(name=name, described=info.plain()), actor=actor.name)
    store.revoke(name)


if __name__ == "__main__":
    main()
