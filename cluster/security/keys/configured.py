"""Opens the configured key store (`secrets`): the embedded keyring or HashiCorp Vault.

Before each call to the store, the broker checks the policies for the caller's token. So one Vault role is enough for a
whole installation, and no job has a Vault token.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import hvac  # type: ignore[import-untyped]

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.keys.keyring import RING_NAME, Keyring, check_keyring, open_local, open_with_passphrase
from cluster.security.keys.store import KeyStore
from cluster.security.keys.vault import VaultKeyStore
from cluster.security.keys.vault_session import (
    KUBERNETES_TOKEN,
    AppRole,
    Auth,
    Jwt,
    Kubernetes,
    keep_renewed,
    login,
)
from cluster.security.private_file import read_secret_file
from cluster.settings import PlatformConfig, SecretsKind, VaultAuth, VaultConfig
from cluster.storage import layout, local, resolve

RETRY_S = 30.0
LOG = logging.getLogger("falaj.keys")


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
    vault = config.secrets.vault
    client, auth = connect_to_vault(vault), vault_auth(vault)
    threading.Thread(
        target=_stay_logged_in, args=(client, auth, stopped), name="vault-login", daemon=True
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


def connect_to_vault(vault: VaultConfig) -> hvac.Client:
    """Log in to the configured Vault, and return the client.

    Raises:
        ConfigError, Unauthenticated, KeyStoreUnavailable: see `open_store`.
    """
    return login(
        vault.address,
        vault_auth(vault),
        ca=Path(resolve(vault.ca_file)) if vault.ca_file else None,
        namespace=vault.namespace,
    )


def vault_auth(vault: VaultConfig) -> Auth:
    """Return the login method. It reads the secret's file for each login, so the file can be replaced at any time."""
    mount = vault.auth_mount or vault.auth.value
    file = Path(resolve(vault.secret_file)) if vault.secret_file else KUBERNETES_TOKEN
    match vault.auth:
        case VaultAuth.approle:
            return AppRole(role_id=vault.role, secret_id=lambda: _read_vault_secret(file), mount=mount)
        case VaultAuth.jwt:
            return Jwt(role=vault.role, token=lambda: _read_vault_secret(file), mount=mount)
        case VaultAuth.kubernetes:
            return Kubernetes(role=vault.role, token_path=file, mount=mount)


def _read_vault_secret(file: Path) -> str:
    return read_secret_file(file, what="the secret that opens Vault")


def _stay_logged_in(client: hvac.Client, auth: Auth, stopped: threading.Event) -> None:
    """Renew the login until `stopped` is set.

    After a refused login, it tries again, because the operator may replace the secret.
    """
    while not stopped.is_set():
        try:
            keep_renewed(client, auth, stopped=stopped)
            return
        except (Unauthenticated, ConfigError) as error:
            LOG.error(
                "Keys become unusable when Vault's token expires, because it could not be renewed: %s", error
            )
            stopped.wait(RETRY_S)
