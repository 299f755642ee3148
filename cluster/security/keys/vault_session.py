"""Login to HashiCorp Vault, renewal of the login, and reading secrets and certificates from Vault.

hvac's `Client` has three traps. Without a token, it takes a token from the environment or the home folder. It follows
redirects and sends the token to their target. It reports an expired token as a missing right. `login` and
`translated_errors` avoid these traps.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hvac  # type: ignore[import-untyped]
import requests
from hvac import exceptions as vault_errors

from cluster.errors import AccessDenied, ConfigError, InvalidRequest, Unauthenticated
from cluster.security.keys.store import KeyNotFound, KeyStoreUnavailable
from cluster.security.private_file import read_secret_file
from cluster.settings import VaultAuth, VaultConfig
from cluster.storage import resolve

KUBERNETES_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
MIN_LEASE_S = 60
"""A shorter lease, in seconds, means that the token reaches its maximum lifetime. Then the client logs in again."""
RETRY_S = 5.0
RELOGIN_S = 30.0
"""Seconds after a refused login until the next try."""
LOG = logging.getLogger("falaj.keys")


@dataclass(frozen=True, kw_only=True, slots=True)
class AppRole:
    """Login with a role id and a secret id."""

    role_id: str
    secret_id: Callable[[], str] = field(repr=False)
    """Returns the current secret id."""
    mount: str = "approle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Jwt:
    """Login with a token of an OIDC issuer that Vault trusts."""

    role: str
    token: Callable[[], str] = field(repr=False)
    """Returns a token that is valid now."""
    mount: str = "jwt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kubernetes:
    """Login with the pod's service account."""

    role: str
    token_path: Path = KUBERNETES_TOKEN
    mount: str = "kubernetes"


Auth = AppRole | Jwt | Kubernetes


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedCertificate:
    """A certificate of Vault's PKI with its private key, as PEM."""

    certificate: str
    private_key: str = field(repr=False)
    ca_chain: tuple[str, ...]
    serial: str
    expires_at: dt.datetime


def login(
    address: str,
    auth: Auth,
    *,
    ca: Path | None = None,
    namespace: str | None = None,
    timeout_s: float = 5.0,
) -> hvac.Client:
    """Log in to Vault, and return the client.

    Args:
        address: `https://host:port`; plain http is allowed for loopback only.
        auth: the login method.
        ca: file of the authority that signed Vault's certificate; the system's authorities by default.
        namespace: namespace of Vault Enterprise.
        timeout_s: seconds to wait for an answer.

    Raises:
        ConfigError: the address would send the token without encryption.
        Unauthenticated: Vault refuses the credentials.
        KeyStoreUnavailable: Vault is down or sealed.
    """
    url = urlsplit(address)
    if url.scheme != "https" and not (
        url.scheme == "http" and url.hostname in ("127.0.0.1", "::1", "localhost")
    ):
        raise ConfigError(f"Vault's address must be https (http on loopback alone), got {address!r}.")
    client = hvac.Client(
        url=address,
        token="",
        verify=str(ca) if ca else True,
        namespace=namespace,
        timeout=timeout_s,
        allow_redirects=False,  # requests would send the token to the redirect's target
    )
    log_in_again(client, auth)
    return client


def log_in_again(client: hvac.Client, auth: Auth) -> int:
    """Give a client a new token and return its lease in seconds; 0 means no expiry.

    Raises:
        Unauthenticated: Vault refuses the credentials.
        KeyStoreUnavailable: Vault is down or sealed.
    """
    try:
        with translated_errors("log in"):
            login_data = require_part(_log_in(client, auth), "auth")
    except (AccessDenied, InvalidRequest, KeyNotFound) as error:
        kind = type(auth).__name__
        raise Unauthenticated(
            f"Vault refuses the {kind} login at auth/{auth.mount}: {error} Check the role and its credentials."
        ) from None
    except OSError as error:
        raise Unauthenticated(f"The secret that opens Vault cannot be read: {error}.") from None
    client.token = login_data["client_token"]
    return int(login_data["lease_duration"])


def renew(client: hvac.Client, auth: Auth) -> int:
    """Extend the client's token or get a new one, and return the seconds until the next renewal is due.

    Raises:
        Unauthenticated, KeyStoreUnavailable: see `log_in_again`.
    """
    try:
        with translated_errors("renew the token"):
            lease_s = int(require_part(client.auth.token.renew_self(), "auth")["lease_duration"])
    except (AccessDenied, InvalidRequest):  # expired, revoked, or not renewable
        return log_in_again(client, auth)
    return lease_s if lease_s == 0 or lease_s > MIN_LEASE_S else log_in_again(client, auth)


def keep_renewed(client: hvac.Client, auth: Auth, *, stopped: threading.Event) -> None:
    """Renew the client's token at two thirds of its lifetime until `stopped` is set. Run it in its own thread.

    While Vault is unavailable, it waits and tries again.

    Raises:
        Unauthenticated: Vault no longer accepts the credentials.
    """
    wait_s = 0.0
    while not stopped.wait(wait_s):
        try:
            lease_s = renew(client, auth)
        except KeyStoreUnavailable:
            wait_s = RETRY_S
            continue
        if lease_s == 0:
            return
        wait_s = max(1.0, lease_s * 2 / 3)


def read_secret(client: hvac.Client, path: str, *, mount: str = "secret") -> dict[str, Any]:
    """Return the newest version of a secret in KV version 2.

    Raises:
        KeyNotFound: no secret at `path`.
        AccessDenied, KeyStoreUnavailable: errors of Vault.
    """
    with translated_errors(f"read the secret {mount}/{path}"):
        answer = client.secrets.kv.v2.read_secret_version(
            path=path, mount_point=mount, raise_on_deleted_version=True
        )
    return dict(require_part(answer, "data")["data"])


def issue_certificate(
    client: hvac.Client,
    *,
    role: str,
    common_name: str,
    alt_names: tuple[str, ...] = (),
    ip_addresses: tuple[str, ...] = (),
    ttl_s: int = 24 * 3600,
    mount: str = "pki",
) -> IssuedCertificate:
    """Return a new key and its certificate from Vault's PKI.

    Raises:
        InvalidRequest: the role does not exist or does not allow these names.
        AccessDenied, KeyStoreUnavailable: errors of Vault.
    """
    extra = {"alt_names": ",".join(alt_names), "ip_sans": ",".join(ip_addresses), "ttl": f"{ttl_s}s"}
    with translated_errors(f"issue a certificate for {common_name} from {mount}/{role}"):
        answer = client.secrets.pki.generate_certificate(
            name=role, common_name=common_name, extra_params=extra, mount_point=mount
        )
    data = require_part(answer, "data")
    return IssuedCertificate(
        certificate=data["certificate"],
        private_key=data["private_key"],
        ca_chain=tuple(data.get("ca_chain") or [data["issuing_ca"]]),
        serial=data["serial_number"],
        expires_at=dt.datetime.fromtimestamp(int(data["expiration"]), dt.UTC),
    )


@contextlib.contextmanager
def translated_errors(attempt: str) -> Iterator[None]:
    """Convert hvac's exceptions to Falaj's exceptions.

    The causes are dropped, because they contain the request with its token and the text of the answer.

    Args:
        attempt: completes "Vault refused to …" in the messages.
    """
    try:
        yield
    except vault_errors.Forbidden:
        raise AccessDenied(
            f"Vault refused to {attempt}: the token's policies do not grant it, or the token has expired."
        ) from None
    except vault_errors.Unauthorized:
        raise Unauthenticated(f"Vault refused to {attempt}: the token is not valid.") from None
    except vault_errors.InvalidPath:
        raise KeyNotFound(f"Vault could not {attempt}: not found. Is the engine mounted?") from None
    except vault_errors.InvalidRequest as error:
        raise InvalidRequest(f"Vault could not {attempt}: {error.args[0]}.") from None
    except vault_errors.VaultDown as error:
        raise KeyStoreUnavailable(
            f"Vault could not {attempt}: {error.args[0]}. Unseal it or wait for it."
        ) from None
    except vault_errors.VaultError as error:
        raise KeyStoreUnavailable(
            f"Vault could not {attempt}: {type(error).__name__}, {error.args[0]}."
        ) from None
    except requests.RequestException as error:
        raise KeyStoreUnavailable(
            f"Vault could not {attempt}: no answer ({type(error).__name__}). Is its address right, and is it up?"
        ) from None


def require_part(answer: Any, part: str) -> dict[str, Any]:
    """Return a part of Vault's answer. If the response has no JSON or is a redirect, hvac returns the raw response.

    Raises:
        KeyStoreUnavailable: the part is missing.
    """
    content = answer.get(part) if isinstance(answer, dict) else None
    if not isinstance(content, dict):
        raise KeyStoreUnavailable(
            f"Vault's answer has no '{part}'. Check that the address is the one of Vault's active node."
        )
    return content


def _log_in(client: hvac.Client, auth: Auth) -> Any:
    # use_token=False, because hvac would also read a token from an invalid answer. The caller checks the answer first.
    match auth:
        case AppRole():
            return client.auth.approle.login(
                role_id=auth.role_id, secret_id=auth.secret_id(), use_token=False, mount_point=auth.mount
            )
        case Jwt():
            return client.auth.jwt.jwt_login(
                role=auth.role, jwt=auth.token(), use_token=False, path=auth.mount
            )
        case Kubernetes():
            jwt = auth.token_path.read_text().strip()
            return client.auth.kubernetes.login(
                role=auth.role, jwt=jwt, use_token=False, mount_point=auth.mount
            )


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


def stay_logged_in(client: hvac.Client, auth: Auth, stopped: threading.Event) -> None:
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
            stopped.wait(RELOGIN_S)
