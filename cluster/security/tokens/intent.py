"""A job's own principal: a signed, short-lived statement that a subject runs one entrypoint for one purpose.

The token lies in a 0600 file whose path travels (FALAJ_INTENT_FILE, or the configuration's `identity.token_file`),
never the token itself: a Ray runtime_env is readable to everyone on the dashboard. The job's process reads and checks
it, and each worker that touches data does so again, from the same path.

An intent has a type and an audience of its own, so it opens nothing at the edge, and an access token runs no job. It
may outlive the token that it was made from, because jobs run longer than tokens hold, but it is good for one
entrypoint alone. In production an OIDC issuer signs it, for the audience INTENT_AUDIENCE and with the claim
`entrypoint`; where it cannot set `typ`, give `rules` the types it does set, and the audience still keeps them apart.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.issuer import ISSUER, replace_private, sign
from cluster.security.tokens.oidc import KeySource
from cluster.security.tokens.principal import ClaimNames, Principal, local_keys, principal_of
from cluster.security.tokens.verification import (
    MAX_TOKEN_BYTES,
    MODEL_SCOPE,
    TokenRules,
    stated,
    text_claim,
    verified_claims,
)
from cluster.storage import Layout

INTENT_TYPE = "falaj-intent+jwt"
INTENT_AUDIENCE = "falaj-intent"
FILE_VARIABLE = "FALAJ_INTENT_FILE"
DEFAULT_TTL_S = 3600
MAX_TTL_S = 86_400
_ENTRYPOINT = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a job may say of itself."""

    principal: Principal
    """Its `entrypoint` is the intent's, so policies and records see the job."""
    entrypoint: str
    """Module that is run, for example "feature_jobs.ingest"."""
    intent_id: str
    """The token's `jti`, for the ledger."""


class IntentVerifier:
    """Verifies intents."""

    def __init__(
        self,
        keys: KeySource,
        *,
        rules: TokenRules | None = None,
        names: ClaimNames | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._names = names
        self._rules = rules or TokenRules(
            issuer=ISSUER,
            audience=INTENT_AUDIENCE,
            types=frozenset({INTENT_TYPE}),
            max_lifetime_s=MAX_TTL_S,
        )
        self._clock = clock

    @classmethod
    def of(cls, places: Layout) -> IntentVerifier:
        """The verifier of the local issuer's intents.

        Raises:
            ConfigError: there is no issuer yet.
        """
        return cls(local_keys(places))

    def verify(self, token: str, *, entrypoint: str | None = None) -> Intent:
        """The intent that a token states.

        Args:
            entrypoint: what is being run; none accepts every one, for who serves many jobs (the key broker).

        Raises:
            Unauthenticated: as for an access token, or an intent for another entrypoint.
        """
        claims = verified_claims(token, find=self._keys.find, rules=self._rules, now=self._clock())
        stated = text_claim(claims, "entrypoint")
        if not _ENTRYPOINT.fullmatch(stated):
            raise Unauthenticated("The intent's entrypoint is no module.")
        if entrypoint is not None and stated != entrypoint:
            raise Unauthenticated(
                f"The intent is for '{stated}', not for '{entrypoint}'. Ask for one of its own."
            )
        intent_id = text_claim(claims, "jti")
        return Intent(
            principal=principal_of(claims, entrypoint=stated, names=self._names),
            entrypoint=stated,
            intent_id=intent_id,
        )


def mint_intent(places: Layout, principal: Principal, *, entrypoint: str, ttl_s: int = DEFAULT_TTL_S) -> str:
    """An intent of the dev issuer, for a principal that a verifier gave.

    Raises:
        ConfigError: no issuer yet, an entrypoint that is no module, or a lifetime beyond MAX_TTL_S.
    """
    if not _ENTRYPOINT.fullmatch(entrypoint):
        raise ConfigError(
            f"'{entrypoint}' is no module that could be run. Give one like 'feature_jobs.ingest'."
        )
    if ttl_s > MAX_TTL_S:
        raise ConfigError(
            f"An intent may hold for at most {MAX_TTL_S} s, not {ttl_s}. Ask for a shorter one."
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
    """Where this process finds its token: the configuration's file, else the one the environment names, if any."""
    path = configured or environment.get(FILE_VARIABLE)
    return Path(path) if path else None


def write_intent(path: Path, token: str) -> None:
    """Keep an intent where only its owner reads it; replaces an older one whole."""
    replace_private(path, token.encode())


def read_intent(path: Path, verifier: IntentVerifier, *, entrypoint: str | None = None) -> Intent:
    """The intent in a file.

    Raises:
        ConfigError: no such file, or one that others own or can read.
        Unauthenticated: see `IntentVerifier.verify`.
    """
    return verifier.verify(read_private(path), entrypoint=entrypoint)


def read_private(path: Path) -> str:
    """The token in a file of one's own.

    Raises:
        ConfigError: no such file, or one that others own or can read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"No token can be read at {path}: {error.strerror}. Ask for a new one.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ConfigError(f"The token at {path} is not a file of yours alone. Give it mode 0600.")
        content = os.read(descriptor, MAX_TOKEN_BYTES + 2)
    finally:
        os.close(descriptor)
    return content.decode(errors="replace").strip()


def is_intent(token: str) -> bool:
    """Whether a token says, by type or audience, that it is an intent; whose verifier then holds it to that."""
    header, claims = stated(token)
    return header.get("typ") == INTENT_TYPE or claims.get("aud") == INTENT_AUDIENCE
