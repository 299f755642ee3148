"""What makes a signed token ours: everything that is checked before a claim is believed.

joserfc checks the signature and the registered claims. Before it, the header must be of the few forms we accept: no
key or address of a key that the token brings along, no critical extension, one of the allowed algorithms, and a `kid`
that is looked up among our own keys and nowhere else. JSON that says a name twice is refused, since two readers could
understand it differently. No message repeats what a token says, so refusals can be counted by their message.
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
"""The algorithms there are to choose from, by type of key; none of them takes a shared secret."""
ACCESS_TYPES = frozenset({"", "jwt", "at+jwt"})
"""The `typ` of access tokens, in lower case; absent counts as empty."""
_HEADERS = frozenset({"alg", "kid", "typ", "x5t", "x5t#S256"})
KID = re.compile(r"[A-Za-z0-9_.:+/=-]{1,200}")
"""A key's name that a token may give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRules:
    """What a token must say."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ("ES256",)
    types: frozenset[str] = ACCESS_TYPES
    leeway_s: int = LEEWAY_S
    """How far the issuer's clock may be off."""
    max_bytes: int = MAX_TOKEN_BYTES
    max_lifetime_s: int = MAX_LIFETIME_S
    """A later expiry is refused: a mistake, or somebody's skeleton key."""

    def __post_init__(self) -> None:
        unknown = set(self.algorithms) - set(KEY_TYPES)
        if unknown or not self.algorithms:
            raise ValueError(
                f"A token's algorithms must be some of {', '.join(KEY_TYPES)}, got {', '.join(self.algorithms)}."
            )


def verified_claims(token: str, *, find: FindKey, rules: TokenRules, now: float) -> dict[str, Any]:
    """The claims of a token that holds at `now` (Unix seconds).

    Raises:
        Unauthenticated: whatever else is given.
    """
    header = _header(token, rules)
    key = find(header["kid"])
    if key is None:
        raise Unauthenticated("The token's key is not one of its issuer's.")
    try:
        payload = deserialize_compact(token, key, algorithms=[header["alg"]]).payload
    except (JoseError, ValueError, TypeError) as error:
        raise Unauthenticated("The token's signature is not valid.") from error
    claims = _object(payload)
    _check_claims(claims, rules, now)
    return claims


def stated(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of a token, unverified: for choosing the rules that it is then held to; empty if unreadable."""
    try:
        header, claims = (_object(_decoded(part)) for part in token[:MAX_TOKEN_BYTES].split(".")[:2])
    except (Unauthenticated, ValueError):
        return {}, {}
    return header, claims


def text_claim(claims: dict[str, Any], name: str, *, default: str | None = None) -> str:
    """A claim that is printable text.

    Raises:
        Unauthenticated: it is missing and has no default, or is no text that a log line can hold.
    """
    value = claims.get(name, default)
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise Unauthenticated(
            f"The token's claim '{name}' is not printable text of at most {MAX_TEXT} characters."
        )
    return value


def scoped_models(claims: dict[str, Any], name: str) -> tuple[str, ...] | None:
    """The models that a scope names, as `model:<name>` among its words; none where it names no model.

    Raises:
        Unauthenticated: it is neither text nor a list of words.
    """
    value = claims.get(name)
    words = [] if value is None else value.split(" ") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Unauthenticated(f"The token's claim '{name}' is neither text nor a list of words.")
    models = [word.removeprefix(MODEL_SCOPE) for word in words if word.startswith(MODEL_SCOPE)]
    return tuple(sorted(set(models))) or None


def _header(token: str, rules: TokenRules) -> dict[str, str]:
    if not isinstance(token, str) or not token.isascii():
        raise Unauthenticated("The token is no text of three base64url parts.")
    if len(token) > rules.max_bytes:
        raise Unauthenticated(f"The token is longer than {rules.max_bytes} bytes.")
    parts = token.split(".")
    if len(parts) != 3:
        raise Unauthenticated("The token is no text of three base64url parts.")
    header = _object(_decoded(parts[0]))
    if not all(isinstance(value, str) for value in header.values()) or not header.keys() <= _HEADERS:
        raise Unauthenticated("The token's header has fields that are not accepted here.")
    if header.get("alg") not in rules.algorithms:
        raise Unauthenticated(f"The token is not signed with {' or '.join(rules.algorithms)}.")
    if header.get("typ", "").lower().removeprefix("application/") not in rules.types:
        raise Unauthenticated(
            "The token is of another type: access tokens and intents do not stand in for each other."
        )
    if not KID.fullmatch(header.get("kid", "")):
        raise Unauthenticated("The token does not name its key.")
    return header


def _decoded(part: str) -> bytes:
    try:
        return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise Unauthenticated("The token is no text of three base64url parts.") from None


def _object(data: bytes | None) -> dict[str, Any]:
    """A JSON object that says each name once, at every depth."""
    try:
        value = json.loads((data or b"").decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Unauthenticated("The token's parts are no JSON objects that say each name once.") from None
    if not isinstance(value, dict):
        raise Unauthenticated("The token's parts are no JSON objects that say each name once.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name twice")
    return value


def _no_constant(name: str) -> Any:
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
        raise Unauthenticated(f"The token's claim '{error.claim}' does not hold here and now.") from None
    except (JoseError, ValueError, TypeError, OverflowError):
        raise Unauthenticated("The token's claims cannot be understood.") from None
    if claims["exp"] > now + rules.max_lifetime_s + rules.leeway_s:
        raise Unauthenticated(f"The token would hold for more than {rules.max_lifetime_s} s.")
