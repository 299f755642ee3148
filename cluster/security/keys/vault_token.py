"""Read a job's token from Vault: `identity.token_file=vault:<path>#<field>`, a secret of KV version 2.

The process that issues tokens writes them to this path and renews them. The job logs in to Vault with its own
credentials (`secrets.vault`), which must permit reading the path. Only the reference is passed between processes, never
the token.
"""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.security.keys.vault_session import connect_to_vault, read_secret
from cluster.security.tokens.intent import VAULT_SCHEME
from cluster.settings import VaultConfig


def token_in_vault(reference: str, vault: VaultConfig) -> str:
    """Return the current token.

    Raises:
        ConfigError: the reference is malformed, no Vault is configured, or the secret has no such field.
        KeyNotFound: the secret does not exist.
        Unauthenticated, AccessDenied, KeyStoreUnavailable: errors of Vault.
    """
    path, _, field = reference.removeprefix(VAULT_SCHEME).partition("#")
    if not path or not field:
        raise ConfigError(
            f"identity.token_file={reference} must be {VAULT_SCHEME}<path>#<field> of a secret in KV."
        )
    if not vault.address:
        raise ConfigError(
            f"identity.token_file={reference} needs secrets.vault.address and a login method. Set secrets.vault."
        )
    token = read_secret(connect_to_vault(vault), path, mount=vault.kv_mount).get(field)
    if not isinstance(token, str) or not token.strip():
        raise ConfigError(f"Vault's secret {vault.kv_mount}/{path} has no token in its field '{field}'.")
    return token.strip()
