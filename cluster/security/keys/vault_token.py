"""A job's token that lies in Vault: `identity.token_file=vault:<path>#<field>`, a secret of KV version 2.

Whoever issues tokens writes them there and keeps them fresh; the job logs in as `secrets.vault` says, with rights to
that path of its own. The reference travels like a file's name, the token never does.
"""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.security.keys.configured import logged_in
from cluster.security.keys.vault_session import read_secret
from cluster.settings import VaultConfig

SCHEME = "vault:"


def token_in_vault(reference: str, vault: VaultConfig) -> str:
    """The token of now.

    Raises:
        ConfigError: the reference is none, no Vault is configured, or the secret has no such field.
        KeyNotFound: no such secret.
        Unauthenticated, AccessDenied, KeyStoreUnavailable: as Vault says.
    """
    path, _, field = reference.removeprefix(SCHEME).partition("#")
    if not path or not field:
        raise ConfigError(
            f"identity.token_file={reference} must be {SCHEME}<path>#<field> of a secret in KV."
        )
    if not vault.address:
        raise ConfigError(
            f"identity.token_file={reference} needs secrets.vault.address and how to log in there."
        )
    token = read_secret(logged_in(vault), path, mount=vault.kv_mount).get(field)
    if not isinstance(token, str) or not token.strip():
        raise ConfigError(f"Vault's secret {vault.kv_mount}/{path} has no token in its field '{field}'.")
    return token.strip()
