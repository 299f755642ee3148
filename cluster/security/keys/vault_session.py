"""Getting into HashiCorp Vault, staying in, and what else is fetched there: secrets and certificates.

hvac's `Client` takes a token from the environment or the home folder unless it is given one, follows redirects with the
token in hand, and reports an expired token as a missing right: `login` and `translated` see to these.
"""

from __future__ import annotations

import contextlib
import datetime as dt
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

KUBERNETES_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
MIN_LEASE_S = 60
"""A lease this short is the token's last: log in anew."""
RETRY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AppRole:
    """A machine's role and secret."""

    role_id: str
    secret_id: Callable[[], str] = field(repr=False)
    """Gives the secret id of now."""
    mount: str = "approle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Jwt:
    """A token of an OIDC issuer that Vault trusts."""

    role: str
    token: Callable[[], str] = field(repr=False)
    """Gives a token that is valid now."""
    mount: str = "jwt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kubernetes:
    """The service account of the pod."""

    role: str
    token_path: Path = KUBERNETES_TOKEN
    mount: str = "kubernetes"


Auth = AppRole | Jwt | Kubernetes


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedCertificate:
    """A certificate of Vault's PKI with its key, as PEM."""

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
    """A client with a token of its own.

    Args:
        address: `https://host:port`; plain http is for loopback alone.
        auth: how to log in.
        ca: the authority that signed Vault's certificate; the system's by default.
        namespace: of Vault Enterprise.
        timeout_s: seconds to wait for an answer.

    Raises:
        ConfigError: the address would send the token in the clear.
        Unauthenticated: Vault does not take the credentials.
        KeyStoreUnavailable: Vault is down or sealed.
    """
    parts = urlsplit(address)
    if parts.scheme != "https" and not (
        parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    ):
        raise ConfigError(f"Vault's address must be https (http on loopback alone), got {address!r}.")
    client = hvac.Client(
        url=address,
        token="",
        verify=str(ca) if ca else True,
        namespace=namespace,
        timeout=timeout_s,
        allow_redirects=False,  # requests would carry the token to wherever it is sent
    )
    log_in_again(client, auth)
    return client


def log_in_again(client: hvac.Client, auth: Auth) -> int:
    """Give a client a new token; gives its lease in seconds, 0 for one that does not end.

    Raises:
        Unauthenticated: Vault does not take the credentials.
        KeyStoreUnavailable: Vault is down or sealed.
    """
    try:
        with translated("log in"):
            granted = body(_log_in(client, auth), "auth")
    except (AccessDenied, InvalidRequest, KeyNotFound) as error:
        kind = type(auth).__name__
        raise Unauthenticated(
            f"Vault takes no {kind} login at auth/{auth.mount}: {error} Check the role and its credentials."
        ) from None
    except OSError as error:
        raise Unauthenticated(f"The secret that opens Vault cannot be read: {error}.") from None
    client.token = granted["client_token"]
    return int(granted["lease_duration"])


def renew(client: hvac.Client, auth: Auth) -> int:
    """Make the client's token last longer, or get another one; gives the seconds until it must be done again.

    Raises:
        Unauthenticated, KeyStoreUnavailable: as `log_in_again`.
    """
    try:
        with translated("renew the token"):
            lease_s = int(body(client.auth.token.renew_self(), "auth")["lease_duration"])
    except (AccessDenied, InvalidRequest):  # expired, revoked, or not renewable
        return log_in_again(client, auth)
    return lease_s if lease_s == 0 or lease_s > MIN_LEASE_S else log_in_again(client, auth)


def keep_renewed(client: hvac.Client, auth: Auth, *, stopped: threading.Event) -> None:
    """Renew the client's token at two thirds of its life until `stopped` is set; for a thread of its own.

    Vault being away for a while is waited out.

    Raises:
        Unauthenticated: Vault no longer takes the credentials.
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
    """The newest version of a secret in KV version 2.

    Raises:
        KeyNotFound: there is none at `path`.
        AccessDenied, KeyStoreUnavailable.
    """
    with translated(f"read the secret {mount}/{path}"):
        answer = client.secrets.kv.v2.read_secret_version(
            path=path, mount_point=mount, raise_on_deleted_version=True
        )
    return dict(body(answer, "data")["data"])


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
    """A new key and its certificate from Vault's PKI.

    Raises:
        InvalidRequest: the role does not exist or does not grant these names.
        AccessDenied, KeyStoreUnavailable.
    """
    extra = {"alt_names": ",".join(alt_names), "ip_sans": ",".join(ip_addresses), "ttl": f"{ttl_s}s"}
    with translated(f"issue a certificate for {common_name} from {mount}/{role}"):
        answer = client.secrets.pki.generate_certificate(
            name=role, common_name=common_name, extra_params=extra, mount_point=mount
        )
    data = body(answer, "data")
    return IssuedCertificate(
        certificate=data["certificate"],
        private_key=data["private_key"],
        ca_chain=tuple(data.get("ca_chain") or [data["issuing_ca"]]),
        serial=data["serial_number"],
        expires_at=dt.datetime.fromtimestamp(int(data["expiration"]), dt.UTC),
    )


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn hvac's exceptions into ours. `doing` completes "Vault refused to ...".

    The causes are left out: they hold the request with its token and the answer's text.
    """
    try:
        yield
    except vault_errors.Forbidden:
        raise AccessDenied(
            f"Vault refused to {doing}: the token's policies do not grant it, or the token has expired."
        ) from None
    except vault_errors.Unauthorized:
        raise Unauthenticated(f"Vault refused to {doing}: it takes no such token.") from None
    except vault_errors.InvalidPath:
        raise KeyNotFound(f"Vault could not {doing}: nothing is there. Is the engine mounted?") from None
    except vault_errors.InvalidRequest as error:
        raise InvalidRequest(f"Vault could not {doing}: {error.args[0]}.") from None
    except vault_errors.VaultDown as error:
        raise KeyStoreUnavailable(
            f"Vault could not {doing}: {error.args[0]}. Unseal it or wait for it."
        ) from None
    except vault_errors.VaultError as error:
        raise KeyStoreUnavailable(
            f"Vault could not {doing}: {type(error).__name__}, {error.args[0]}."
        ) from None
    except requests.RequestException as error:
        raise KeyStoreUnavailable(
            f"Vault could not {doing}: no answer ({type(error).__name__}). Is its address right, and is it up?"
        ) from None


def body(answer: Any, part: str) -> dict[str, Any]:
    """A part of Vault's answer; hvac gives a bare response where there is no JSON, or a redirect.

    Raises:
        KeyStoreUnavailable: the part is not there.
    """
    found = answer.get(part) if isinstance(answer, dict) else None
    if not isinstance(found, dict):
        raise KeyStoreUnavailable(
            f"Vault's answer has no '{part}'. Is the address that of Vault's active node, or of something else?"
        )
    return found


def _log_in(client: hvac.Client, auth: Auth) -> Any:
    # hvac would take the token out of an answer that may be none: it is left to the caller.
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
