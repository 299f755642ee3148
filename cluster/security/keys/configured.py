"""The key store that the broker opens, as `secrets` says: the embedded keyring, or HashiCorp Vault.

Either way the broker stands in front: it asks the policies for the caller's token before the store is asked, so in
Vault one role is enough for a whole installation, and no job ever has a Vault token.
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
    """The store, ready for use; with Vault, a thread keeps the login alive until `stopped` is set.

    Raises:
        ConfigError: the store is not one for this tier, or cannot be used as it is configured.
        Unauthenticated, KeyStoreUnavailable: Vault does not take the login, or does not answer.
        RefusedError: what is wrong with the keyring, as `open_local`.
    """
    if config.secrets.kind is SecretsKind.keyring:
        check_keyring(config.secrets, tier=config.tier)
        return open_keyring(config)
    vault = config.secrets.vault
    client, auth = logged_in(vault), vault_auth(vault)
    threading.Thread(
        target=_stay_logged_in, args=(client, auth, stopped), name="vault-login", daemon=True
    ).start()
    return VaultKeyStore(client, mount=vault.transit_mount, kv_mount=vault.kv_mount, prefix=vault.prefix)


def open_keyring(config: PlatformConfig) -> Keyring:
    """The keyring of the storage root, by its key's file or its passphrase.

    Raises:
        ConfigError: the passphrase is too short, cannot be read, or lies open; or the keyring has none.
        RefusedError: what is wrong with the keyring, as `open_local`.
    """
    folder = local(layout(config.storage).keys)
    if config.secrets.passphrase_file is None:
        return open_local(folder)
    file = Path(resolve(config.secrets.passphrase_file))
    try:
        passphrase = read_secret_file(file, what="the keyring's passphrase")
    except OSError as error:
        raise ConfigError(
            f"The keyring's passphrase cannot be read from {file}: {error.strerror}. See secrets.passphrase_file."
        ) from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return open_with_passphrase(folder / RING_NAME, passphrase)


def logged_in(vault: VaultConfig) -> hvac.Client:
    """A client of the configured Vault with a token of its own.

    Raises:
        ConfigError, Unauthenticated, KeyStoreUnavailable: as `open_store`.
    """
    return login(
        vault.address,
        vault_auth(vault),
        ca=Path(resolve(vault.ca_file)) if vault.ca_file else None,
        namespace=vault.namespace,
    )


def vault_auth(vault: VaultConfig) -> Auth:
    """How to log in; the file with the secret is read for each login, so that it can be replaced while this runs."""
    mount = vault.auth_mount or vault.auth.value
    file = Path(resolve(vault.secret_file)) if vault.secret_file else KUBERNETES_TOKEN
    match vault.auth:
        case VaultAuth.approle:
            return AppRole(role_id=vault.role, secret_id=lambda: _secret_in(file), mount=mount)
        case VaultAuth.jwt:
            return Jwt(role=vault.role, token=lambda: _secret_in(file), mount=mount)
        case VaultAuth.kubernetes:
            return Kubernetes(role=vault.role, token_path=file, mount=mount)


def _secret_in(file: Path) -> str:
    return read_secret_file(file, what="the secret that opens Vault")


def _stay_logged_in(client: hvac.Client, auth: Auth, stopped: threading.Event) -> None:
    """Renew until told to stop; a login that Vault refuses is tried again, for its secret may be replaced."""
    while not stopped.is_set():
        try:
            keep_renewed(client, auth, stopped=stopped)
            return
        except (Unauthenticated, ConfigError) as error:
            LOG.error("no key can be used once Vault's token has expired: %s", error)
            stopped.wait(RETRY_S)
