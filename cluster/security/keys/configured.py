"""Opens the configured key store (`secrets`): the embedded keyring or HashiCorp Vault.

Before each call to the store, the broker checks the policies for the caller's token. So one Vault role is enough for a
whole installation, and no job has a Vault token.
"""

from __future__ import annotations

import threading
from pathlib import Path

from cluster.errors import ConfigError
from cluster.security.keys.keyring import RING_NAME, Keyring, check_keyring, open_local, open_with_passphrase
from cluster.security.keys.store import KeyStore
from cluster.security.private_file import read_secret_file
from cluster.settings import PlatformConfig, SecretsKind
from cluster.storage import layout, local, resolve


def open_store(config: PlatformConfig, *, stopped: threading.Event) -> KeyStore:
    """Return the key store, ready for use. With Vault, a thread renews the login until `stopped` is set.

    Raises:
        ConfigError: the store is not allowed for this tier, or its configuration cannot be used.
        Unauthenticated, KeyStoreUnavailable: Vault refuses the login, or does not answer.
        RefusedError: the keyring cannot be opened, see `open_local`.
    """
    if config.secrets.kind is SecretsKind.keyring:
        check_keyring(config.secrets, tier=config.tier)
        return open_keyring(config)
    # Imported here, because an installation with a keyring needs neither hvac nor requests.
    from cluster.security.keys.vault import VaultKeyStore
    from cluster.security.keys.vault_session import connect_to_vault, stay_logged_in, vault_auth

    vault = config.secrets.vault
    client, auth = connect_to_vault(vault), vault_auth(vault)
    threading.Thread(
        target=stay_logged_in, args=(client, auth, stopped), name="vault-login", daemon=True
    ).start()
    return VaultKeyStore(client, mount=vault.transit_mount, kv_mount=vault.kv_mount, prefix=vault.prefix)


def open_keyring(config: PlatformConfig) -> Keyring:
    """Open the keyring of the storage root, with its key file or passphrase.

    Raises:
        ConfigError: the passphrase is too short, cannot be read, or is readable by others; or the keyring has no
            passphrase.
        RefusedError: the keyring cannot be opened, see `open_local`.
    """
    folder = local(layout(config.storage).keys)
    if config.secrets.passphrase_file is None:
        return open_local(folder)
    file = Path(resolve(config.secrets.passphrase_file))
    try:
        passphrase = read_secret_file(file, what="the keyring's passphrase")
    except OSError as error:
        raise ConfigError(
            f"The keyring's passphrase cannot be read from {file}: {error.strerror}. Correct secrets.passphrase_file."
        ) from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return open_with_passphrase(folder / RING_NAME, passphrase)
