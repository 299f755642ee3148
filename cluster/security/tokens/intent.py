"""Intents: short-lived signed tokens that allow one subject to run one entry point for one purpose.

The token is in a 0600 file. Only the path of the file is passed on (FALAJ_INTENT_FILE, or `identity.token_file`), never
the token itself, because everyone can read a Ray runtime_env on the dashboard. The job's process reads and verifies the
token, and each worker that reads data verifies it again from the same path.

An intent has its own type and audience. So the edge does not accept intents, and an access token cannot run a job. An
intent may be valid longer than the token that it was made from, because jobs run longer than tokens are valid. In
production an OIDC issuer signs intents, for the audience INTENT_AUDIENCE and with the claim `entrypoint`. If the issuer
cannot set `typ` to INTENT_TYPE, put the types that it sets into `rules`. The audience still separates intents from
access tokens.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.issuer import ISSUER, TOKEN_TTL_S, replace_private_file, sign
from cluster.security.tokens.principal import Principal, Verifier, principal_of
from cluster.security.tokens.verification import (
    MAX_TOKEN_BYTES,
    MODEL_SCOPE,
    TokenRules,
    text_claim,
    unverified_parts,
)
from cluster.storage import Layout

INTENT_TYPE = "falaj-intent+jwt"
INTENT_AUDIENCE = "falaj-intent"
FILE_VARIABLE = "FALAJ_INTENT_FILE"
DEFAULT_TTL_S = 3600
MAX_TTL_S = 86_400
VAULT_SCHEME = "vault:"
"""Start of an `identity.token_file` that names a secret in Vault instead of a file."""
_ENTRYPOINT = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """A verified intent."""

    principal: Principal
    """The principal. It has the intent's `entrypoint`, so that policies and records can name the job."""
    entrypoint: str
    """Module that the job runs, such as "feature_jobs.ingest"."""
    intent_id: str
    """The token's `jti`, for the ledger."""


class IntentVerifier(Verifier):
    """Verifies intents."""

    default_rules = TokenRules(
        issuer=ISSUER,
        audience=INTENT_AUDIENCE,
        types=frozenset({INTENT_TYPE}),
        max_lifetime_s=MAX_TTL_S,
    )

    def verify(self, token: str, *, entrypoint: str | None = None) -> Intent:
        """Return the intent of a token.

        Args:
            token: the token.
            entrypoint: the module that runs. None accepts every entry point: the key broker serves all jobs.

        Raises:
            Unauthenticated: see `Verifier.claims`; or the intent is for another entry point.
        """
        claims = self.claims(token)
        claimed = text_claim(claims, "entrypoint")
        if not _ENTRYPOINT.fullmatch(claimed):
            raise Unauthenticated("The intent's entrypoint is not a module name.")
        if entrypoint is not None and claimed != entrypoint:
            raise Unauthenticated(
                f"The intent is for '{claimed}', not for '{entrypoint}'. Get an intent for that entrypoint."
            )
        intent_id = text_claim(claims, "jti")
        return Intent(
            principal=principal_of(claims, entrypoint=claimed, names=self._names),
            entrypoint=claimed,
            intent_id=intent_id,
        )


def mint_intent(places: Layout, principal: Principal, *, entrypoint: str, ttl_s: int = DEFAULT_TTL_S) -> str:
    """Return an intent of the development issuer for a verified principal.

    Raises:
        ConfigError: there is no issuer yet, the entry point is not a module name or differs from the principal's, or
            the lifetime is longer than MAX_TTL_S.
    """
    if not _ENTRYPOINT.fullmatch(entrypoint):
        raise ConfigError(f"'{entrypoint}' is not a module name. Use a name such as 'feature_jobs.ingest'.")
    if ttl_s > MAX_TTL_S:
        raise ConfigError(
            f"An intent may be valid for at most {MAX_TTL_S} s, got {ttl_s}. Choose a shorter lifetime."
        )
    if principal.entrypoint not in ("", entrypoint):
        raise ConfigError(
            f"An intent for '{principal.entrypoint}' cannot become one for '{entrypoint}'. Use an access token."
        )
    claims = {
        "sub": principal.subject,
        "role": principal.role.value,
        "purpose": principal.purpose,
        "tenant": principal.tenant,
        "entrypoint": entrypoint,
    }
    if principal.models is not None:
        claims["scope"] = " ".join(f"{MODEL_SCOPE}{model}" for model in principal.models)
    return sign(places, claims, audience=INTENT_AUDIENCE, token_type=INTENT_TYPE, ttl_s=ttl_s)


def intent_file(configured: str | None, environment: Mapping[str, str]) -> Path | None:
    """Return the configured path of this process's token, else the path in the environment, else None."""
    path = configured or environment.get(FILE_VARIABLE)
    return Path(path) if path else None


def write_intent(path: Path, token: str) -> None:
    """Write an intent to a file that only its owner can read. An older file is replaced completely."""
    replace_private_file(path, token.encode())


def remove_expired(folder: Path) -> None:
    """Remove the intent files of killed jobs. A running job renews its own more often than the limit."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - TOKEN_TTL_S:
                path.unlink()


def read_intent(path: Path, verifier: IntentVerifier, *, entrypoint: str | None = None) -> Intent:
    """Return the verified intent in a file.

    Raises:
        ConfigError: the file is missing, or other users own it or can read it.
        Unauthenticated: see `IntentVerifier.verify`.
    """
    return verifier.verify(read_token_file(path), entrypoint=entrypoint)


def read_token_file(path: Path) -> str:
    """Return the token in a private file.

    Raises:
        ConfigError: the file is missing, or other users own it or can read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"The token at {path} cannot be read: {error.strerror}. Get a new token.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ConfigError(
                f"The token at {path} must be your own file with mode 0600. Run `chmod 600` on it."
            )
        content = os.read(descriptor, MAX_TOKEN_BYTES + 2)
    finally:
        os.close(descriptor)
    return content.decode(errors="replace").strip()


def is_intent(token: str) -> bool:
    """Return whether a token's type or audience says that it is an intent.

    `IntentVerifier` must still verify the token.
    """
    header, claims = unverified_parts(token)
    return header.get("typ") == INTENT_TYPE or claims.get("aud") == INTENT_AUDIENCE
