"""One signed HTTP request for each event that people must hear of.

The body is the event as `cluster.ledger export` writes it. `X-Falaj-Signature-256` has its HMAC-SHA256, as GitHub's
webhooks have it. `Idempotency-Key` is the hash of the event, so a receiver can drop an event that arrives twice.
Redirects are not followed, and proxies of the environment are not used: the request goes only to the configured host.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from cluster.errors import ConfigError, FalajError
from cluster.ledger import Entry
from cluster.security.private_file import read_secret_file
from cluster.security.tokens.intent import VAULT_SCHEME
from cluster.settings import PlatformConfig, VaultConfig
from cluster.storage import resolve

SIGNATURE = "X-Falaj-Signature-256"
TIMEOUT_S = 5.0
ENV_SCHEME = "env:"


class NotDelivered(FalajError):
    """The receiver did not take the event."""


class Webhook:
    """The configured receiver.

    Args:
        url: Its URL. `WebhookConfig` has validated it.
        secret: Returns the secret that signs bodies. It is called for each request, so a changed secret is used.
    """

    def __init__(self, url: str, secret: Callable[[], str]) -> None:
        self.url = url
        self._secret = secret

    def send(self, entry: Entry) -> None:
        """Send an event, and return when the receiver has taken it.

        Raises:
            NotDelivered: The receiver's status is not 2xx.
            OSError, HTTPException: The receiver cannot be reached, or does not answer in time.
            ConfigError: The secret cannot be read.
        """
        target, body = urlsplit(self.url), entry.line().encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "falaj",
            "Idempotency-Key": entry.hash,
            "X-Falaj-Event": entry.type,
            SIGNATURE: signature(self._secret(), body),
        }
        path = target.path or "/"
        connection = _connection(target)
        try:
            connection.request("POST", f"{path}?{target.query}" if target.query else path, body, headers)
            status = connection.getresponse().status
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise NotDelivered(f"The webhook's receiver answered {status}.")


def signature(secret: str, body: bytes) -> str:
    """Return the value of the signature's header."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def configured_webhook(config: PlatformConfig) -> Webhook | None:
    """Return the receiver of the configuration, or None."""
    hook = config.rollouts.webhook
    if hook.url is None or hook.secret is None:
        return None
    reference = hook.secret
    return Webhook(hook.url, lambda: read_secret(reference, config.secrets.vault))


def read_secret(reference: str, vault: VaultConfig) -> str:
    """Return the secret from a variable of the environment, from Vault, or from a file that only its owner can read.

    Raises:
        ConfigError: It is missing, or other users can read the file.
        OSError: The file cannot be read.
    """
    if reference.startswith(ENV_SCHEME):
        secret = os.environ.get(reference.removeprefix(ENV_SCHEME), "")
    elif reference.startswith(VAULT_SCHEME):
        from cluster.security.keys.vault_token import token_in_vault  # hvac is slow to import

        secret = token_in_vault(reference, vault)
    else:
        secret = read_secret_file(Path(resolve(reference)), what="the secret of the webhook")
    if not secret:
        raise ConfigError(
            f"rollouts.webhook.secret={reference} is empty. Set it, or remove rollouts.webhook.url."
        )
    return secret


def _connection(target: SplitResult) -> http.client.HTTPConnection:
    host = target.hostname or ""
    if target.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, target.port, timeout=TIMEOUT_S, context=context)
    return http.client.HTTPConnection(host, target.port, timeout=TIMEOUT_S)
