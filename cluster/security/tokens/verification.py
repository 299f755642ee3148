"""Verification of signed tokens. Every check happens before a claim is used.

joserfc checks the signature and the registered claims. Before that, this module checks the header: it may contain only
a few fields, so no key, no address of a key and no critical extension. The algorithm must be allowed, and the `kid` is
looked up only among the issuer's known keys. JSON with a duplicate name is refused, because two readers could read
different values. No message repeats the token's content, so refusals can be counted by message.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from joserfc.errors import ExpiredTokenError, InvalidClaimError, JoseError, MissingClaimError
from joserfc.jwk import Key
from joserfc.jws import deserialize_compact
from joserfc.jwt import JWTClaimsRegistry

from cluster.errors import Unauthenticated

FindKey = Callable[[str], Key | None]

MAX_TOKEN_BYTES = 4096
MAX_LIFETIME_S = 7 * 86_400
LEEWAY_S = 30
MAX_TEXT = 200
MODEL_SCOPE = "model:"
KEY_TYPES = {"ES256": "EC", "RS256": "RSA"}
"""Supported algorithms and their key types. No algorithm with a shared secret is supported."""
ACCESS_TYPES = frozenset({"", "jwt", "at+jwt"})
"""Allowed `typ` of access tokens, in lower case. A missing `typ` is the same as an empty one."""
_HEADERS = frozenset({"alg", "kid", "typ", "x5t", "x5t#S256"})
KID = re.compile(r"[A-Za-z0-9_.:+/=-]{1,200}")
"""Pattern of a key id that a token may contain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRules:
    """What a valid token must contain."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ("ES256",)
    types: frozenset[str] = ACCESS_TYPES
    leeway_s: int = LEEWAY_S
    """Allowed difference between the issuer's clock and this machine's clock, in seconds."""
    max_bytes: int = MAX_TOKEN_BYTES
    max_lifetime_s: int = MAX_LIFETIME_S
    """Longest lifetime in seconds. A later expiry is refused as a mistake or an attack."""

    def __post_init__(self) -> None:
        unknown = set(self.algorithms) - set(KEY_TYPES)
        if unknown or not self.algorithms:
            raise ValueError(
                f"A token's algorithms must be some of {', '.join(KEY_TYPES)}, got {', '.join(self.algorithms)}."
            )


def verified_claims(token: str, *, find: FindKey, rules: TokenRules, now: float) -> dict[str, Any]:
    """Return the claims of a token that is valid at `now` (Unix seconds).

    Raises:
        Unauthenticated: the token is not valid.
    """
    header = _parse_header(token, rules)
    key = find(header["kid"])
    if key is None:
        raise Unauthenticated("The token's key is not a key of its issuer.")
    try:
        payload = deserialize_compact(token, key, algorithms=[header["alg"]]).payload
    except (JoseError, ValueError, TypeError) as error:
        raise Unauthenticated("The token's signature is not valid.") from error
    claims = _parse_object(payload)
    _check_claims(claims, rules, now)
    return claims


def unverified_parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a token's header and claims without verification, to select the rules for the token.

    If one of them is unreadable, both are empty.
    """
    try:
        header, claims = (_parse_object(_decoded(part)) for part in token[:MAX_TOKEN_BYTES].split(".")[:2])
    except (Unauthenticated, ValueError):
        return {}, {}
    return header, claims


def text_claim(claims: dict[str, Any], name: str, *, default: str | None = None) -> str:
    """Return a claim that must be printable text.

    Raises:
        Unauthenticated: the claim is missing and has no default, or is not printable text.
    """
    value = claims.get(name, default)
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise Unauthenticated(
            f"The token's claim '{name}' is not printable text of at most {MAX_TEXT} characters."
        )
    return value


def scoped_models(claims: dict[str, Any], name: str) -> tuple[str, ...] | None:
    """Return the models that a scope names by words `model:<name>`, or None if it names no model.

    Raises:
        Unauthenticated: the scope is neither text nor a list of words.
    """
    value = claims.get(name)
    words = [] if value is None else value.split(" ") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Unauthenticated(f"The token's claim '{name}' is neither text nor a list of words.")
    models = [word.removeprefix(MODEL_SCOPE) for word in words if word.startswith(MODEL_SCOPE)]
    return tuple(sorted(set(models))) or None


def _parse_header(token: str, rules: TokenRules) -> dict[str, str]:
    if not isinstance(token, str) or not token.isascii():
        raise Unauthenticated("The token is not text of three base64url parts.")
    if len(token) > rules.max_bytes:
        raise Unauthenticated(f"The token is longer than {rules.max_bytes} bytes.")
    parts = token.split(".")
    if len(parts) != 3:
        raise Unauthenticated("The token is not text of three base64url parts.")
    header = _parse_object(_decoded(parts[0]))
    if not all(isinstance(value, str) for value in header.values()) or not header.keys() <= _HEADERS:
        raise Unauthenticated("The token's header has fields that are not allowed.")
    if header.get("alg") not in rules.algorithms:
        raise Unauthenticated(f"The token is not signed with {' or '.join(rules.algorithms)}.")
    if header.get("typ", "").lower().removeprefix("application/") not in rules.types:
        raise Unauthenticated(
            "The token has the wrong type: access tokens and intents cannot replace each other."
        )
    if not KID.fullmatch(header.get("kid", "")):
        raise Unauthenticated("The token does not name its key.")
    return header


def _decoded(part: str) -> bytes:
    try:
        return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise Unauthenticated("The token is not text of three base64url parts.") from None


def _parse_object(data: bytes | None) -> dict[str, Any]:
    """Parse a JSON object whose names are unique at every depth."""
    try:
        value = json.loads(
            (data or b"").decode(), object_pairs_hook=_unique_names, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        raise Unauthenticated("The token's parts are not JSON objects with unique names.") from None
    if not isinstance(value, dict):
        raise Unauthenticated("The token's parts are not JSON objects with unique names.")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate name")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _check_claims(claims: dict[str, Any], rules: TokenRules, now: float) -> None:
    registry = JWTClaimsRegistry(
        now=int(now),
        leeway=rules.leeway_s,
        iss={"essential": True, "value": rules.issuer},
        aud={"essential": True, "value": rules.audience},
        exp={"essential": True},
        sub={"essential": True},
    )
    try:
        registry.validate(claims)
    except ExpiredTokenError:
        raise Unauthenticated("The token has expired.") from None
    except MissingClaimError:
        raise Unauthenticated("The token lacks one of the claims iss, aud, exp, sub.") from None
    except InvalidClaimError as error:
        raise Unauthenticated(f"The token's claim '{error.claim}' is not valid here or now.") from None
    except (JoseError, ValueError, TypeError, OverflowError):
        raise Unauthenticated("The token's claims are malformed.") from None
    if claims["exp"] > now + rules.max_lifetime_s + rules.leeway_s:
        raise Unauthenticated(f"The token is valid for more than {rules.max_lifetime_s} s.")
