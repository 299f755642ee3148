"""The development issuer: signs tokens on the local machine, with a key in a 0600 file below the storage root.

The tier `enterprise_gpu` needs an OIDC issuer. It refuses the development issuer, because a process that reads the key
file can act as every principal. After a rotation, the old public key stays in the JWKS until the last token that the
old key signed has expired.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey

from cluster.errors import ConfigError
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import LEEWAY_S, MAX_LIFETIME_S
from cluster.settings import Tier
from cluster.storage import Layout, local

ALGORITHM = "ES256"
TOKEN_TTL_S = 900
"""Default lifetime of an access token, and lifetime of a job's own intent, in seconds."""
ISSUER = "falaj-dev"
AUDIENCE = "falaj"
PRIVATE_NAME = "issuer.pem"
PUBLIC_NAME = "issuer.pub.pem"
JWKS_NAME = "jwks.json"
RETIRES_AT = "falaj_retires_at"
"""Member of an old key in the JWKS: Unix seconds after which no token of this key can be valid."""


def ensure_issuer(places: Layout, *, tier: Tier = Tier.smb_cpu) -> None:
    """Create the development issuer's key if it does not exist.

    Raises:
        ConfigError: the tier does not allow the development issuer.
    """
    _refuse_in_production(tier)
    keys = local(places.keys)
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(keys):
        if not (keys / PRIVATE_NAME).exists():
            _install(keys, _new_key(), old=[])


def rotate_issuer(
    places: Layout,
    *,
    tier: Tier = Tier.smb_cpu,
    keep_s: int = MAX_LIFETIME_S + LEEWAY_S,
    now: float | None = None,
) -> str:
    """Create a new signing key and return its `kid`.

    Args:
        places: paths below the storage root.
        tier: tier of the installation.
        keep_s: seconds for which tokens of the old key stay valid. If the key was stolen, use 0: all tokens end now.
        now: Unix seconds; the current time by default.

    Raises:
        ConfigError: the tier does not allow the development issuer, or there is no issuer yet.
    """
    _refuse_in_production(tier)
    keys, at = local(places.keys), time.time() if now is None else now
    _private_key(keys)
    with _locked(keys):
        current = _private_key(keys)
        old = [_retiring(entry, current, int(at) + keep_s) for entry in _published(keys)]
        key = _new_key()
        _install(keys, key, old=[entry for entry in old if keep_s > 0 and entry[RETIRES_AT] > at])
    return str(key.kid)


def _retiring(entry: dict[str, Any], current: ECKey, retires_at: int) -> dict[str, Any]:
    """Return a JWKS entry with its retirement time. A key that is already retired keeps its retirement time."""
    if entry["kid"] == current.thumbprint() or RETIRES_AT not in entry:
        return entry | {RETIRES_AT: retires_at}
    return entry


def mint_token(
    places: Layout,
    *,
    subject: str,
    role: Role,
    purpose: str,
    ttl_s: int = TOKEN_TTL_S,
    tenant: str = "default",
    scope: str = "",
) -> str:
    """Return an access token of the development issuer.

    Raises:
        ConfigError: there is no issuer yet, or the lifetime is too long.
    """
    claims = {"sub": subject, "role": role.value, "purpose": purpose, "tenant": tenant}
    claims |= {"scope": scope} if scope else {}
    return sign(places, claims, audience=AUDIENCE, token_type="JWT", ttl_s=ttl_s)  # noqa: S106 - a type, no secret


def sign(places: Layout, claims: dict[str, str], *, audience: str, token_type: str, ttl_s: int) -> str:
    """Return a signed token with the development issuer's name, the time claims and a unique id.

    Raises:
        ConfigError: there is no issuer yet, or the lifetime is too long.
    """
    if ttl_s > MAX_LIFETIME_S:
        raise ConfigError(
            f"A token may be valid for at most {MAX_LIFETIME_S} s, got {ttl_s}. Choose a shorter lifetime."
        )
    key, now = _private_key(local(places.keys)), int(time.time())
    times = {"iat": now, "nbf": now, "exp": now + ttl_s}
    all_claims = {"iss": ISSUER, "aud": audience, **claims, **times, "jti": uuid.uuid4().hex}
    header = {"alg": ALGORITHM, "kid": key.thumbprint(), "typ": token_type}
    return jwt.encode(header, all_claims, key, algorithms=[ALGORITHM])


def write_private_file(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read.

    Raises:
        FileExistsError: the file already exists.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def ensure_secret(path: Path) -> None:
    """Create a file with a random secret of 64 hex characters, completely or not at all, if it is missing or empty."""
    if not path.exists() or path.stat().st_size == 0:
        replace_private_file(path, secrets.token_hex(32).encode())


def replace_private_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write or replace a file, completely or not at all. Only its owner can read it, unless `mode` allows more."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _refuse_in_production(tier: Tier) -> None:
    if tier is Tier.enterprise_gpu:
        raise ConfigError(
            f"Tier {tier.value} does not allow the development issuer: its key file could sign tokens of every "
            "principal. Set identity.issuer.url to an OIDC issuer."
        )


def _new_key() -> ECKey:
    return ECKey.generate_key("P-256", {"use": "sig", "alg": ALGORITHM}, auto_kid=True)


def _install(keys: Path, key: ECKey, *, old: list[dict[str, Any]]) -> None:
    """Write the public files first, then the private key.

    So every signed token can be verified, even if the process is killed in between.
    """
    published = [key.as_dict(private=False), *old]
    replace_private_file(keys / JWKS_NAME, json.dumps({"keys": published}).encode(), mode=0o644)
    replace_private_file(keys / PUBLIC_NAME, key.as_pem(private=False), mode=0o644)
    replace_private_file(keys / PRIVATE_NAME, key.as_pem(private=True))


def no_issuer(path: Path) -> ConfigError:
    """Return the error for a missing file of the development issuer."""
    return ConfigError(
        f"No issuer at {path}. Run `python -m cluster.up` first. It creates the development issuer, unless "
        "identity.issuer.url names another issuer. Then get tokens from that one."
    )


def _private_key(keys: Path) -> ECKey:
    path = keys / PRIVATE_NAME
    if not path.exists():
        raise no_issuer(path)
    return ECKey.import_key(path.read_bytes())


def _published(keys: Path) -> list[dict[str, Any]]:
    path = keys / JWKS_NAME
    if not path.exists():
        raise no_issuer(path)
    return list(json.loads(path.read_text())["keys"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for one writer. The lock is on the folder itself, so there is no lock file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
