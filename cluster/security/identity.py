"""Who is asking: ES256 tokens, minted by a local dev issuer and verified against its JWKS.

    python -m cluster.security.identity token --sub alice --role data_scientist --purpose credit_scoring

The dev issuer's private key is a 0600 file below the storage root. In production an OIDC issuer's JWKS takes its place
and this module only verifies.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError, Unauthenticated
from cluster.security.policy import Role
from cluster.settings import StorageConfig
from cluster.storage import Layout, layout, local

ALGORITHM = "ES256"
ISSUER = "falaj-dev"
AUDIENCE = "falaj"
PRIVATE_NAME = "issuer.pem"
PUBLIC_NAME = "issuer.pub.pem"
JWKS_NAME = "jwks.json"
MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """A verified identity."""

    subject: str
    role: Role
    purpose: str
    expires_at: int
    """Unix seconds."""


class TokenVerifier:
    """Verifies tokens of one issuer against a key set."""

    def __init__(self, keys: KeySet, *, issuer: str = ISSUER, audience: str = AUDIENCE) -> None:
        self._keys = keys
        self._claims = jwt.JWTClaimsRegistry(
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    @classmethod
    def of(cls, places: Layout) -> TokenVerifier:
        """The verifier of the local issuer.

        Raises:
            ConfigError: there is no issuer yet.
        """
        path = local(places.keys) / JWKS_NAME
        if not path.exists():
            raise ConfigError(f"No issuer at {path}. Run `python -m cluster.up` first.")
        return cls(KeySet.import_key_set(json.loads(path.read_text())))

    def verify(self, token: str) -> Principal:
        """The principal of a token.

        Raises:
            Unauthenticated: a wrong signature, algorithm, key, issuer or audience, a token that has expired, is not yet
                valid or says no expiry, or a role that does not exist.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise Unauthenticated(f"The token is longer than {MAX_TOKEN_BYTES} bytes.")
        try:
            decoded = jwt.decode(token, self._keys, algorithms=[ALGORITHM])
            self._claims.validate(decoded.claims)
            claims = decoded.claims
            return Principal(
                subject=str(claims["sub"]),
                role=Role(str(claims.get("role"))),
                purpose=str(claims.get("purpose", "")),
                expires_at=int(claims["exp"]),
            )
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise Unauthenticated(f"The token is not valid: {error}.") from error


def current_actor() -> str:
    """Who runs this process, as events name it."""
    return f"user:{getpass.getuser()}"


def ensure_issuer(places: Layout) -> None:
    """Make the dev issuer's key on first use."""
    keys = local(places.keys)
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    private = keys / PRIVATE_NAME
    if private.exists():
        return
    key = ECKey.generate_key("P-256", {"use": "sig", "alg": ALGORITHM}, auto_kid=True)
    (keys / PUBLIC_NAME).write_bytes(key.as_pem(private=False))
    (keys / JWKS_NAME).write_text(json.dumps(KeySet([key]).as_dict(private=False)))
    write_private(private, key.as_pem(private=True))


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def mint_token(places: Layout, *, subject: str, role: Role, purpose: str, ttl_s: int = 900) -> str:
    """A token of the dev issuer.

    Raises:
        ConfigError: there is no issuer yet.
    """
    private = local(places.keys) / PRIVATE_NAME
    if not private.exists():
        raise ConfigError(f"No issuer at {private}. Run `python -m cluster.up` first.")
    jwks = json.loads((local(places.keys) / JWKS_NAME).read_text())
    kid = jwks["keys"][0]["kid"]
    key = ECKey.import_key(private.read_bytes())
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject,
        "role": role.value,
        "purpose": purpose,
        "iat": now,
        "nbf": now,
        "exp": now + ttl_s,
        "jti": uuid.uuid4().hex,
    }
    return jwt.encode({"alg": ALGORITHM, "kid": kid, "typ": "JWT"}, claims, key, algorithms=[ALGORITHM])


def main() -> None:
    """Parse the flags and print a token."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.security.identity", description="Local identities."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    token = commands.add_parser("token", help="mint a short-lived token from the dev issuer")
    token.add_argument("--sub", required=True, help="subject")
    token.add_argument("--role", required=True, choices=[role.value for role in Role])
    token.add_argument("--purpose", default="", help="what the data will be used for")
    token.add_argument("--ttl-s", type=int, default=900, help="seconds until it expires (default: 900)")
    token.add_argument(
        "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
    )
    token.add_argument("--output", type=Path, help="file to write (mode 0600) instead of standard output")
    arguments = parser.parse_args()
    try:
        places = layout(StorageConfig(root=arguments.root))
        text = mint_token(
            places,
            subject=arguments.sub,
            role=Role(arguments.role),
            purpose=arguments.purpose,
            ttl_s=arguments.ttl_s,
        )
    except RefusedError as error:
        refuse(error)
    if arguments.output is None:
        print(text)
        return
    arguments.output.unlink(missing_ok=True)
    write_private(arguments.output, text.encode())


if __name__ == "__main__":
    main()
