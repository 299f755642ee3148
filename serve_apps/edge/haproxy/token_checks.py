"""Rules that check the token in `txn.token`.

Each of the issuer's keys verifies only tokens that name this key and its algorithm. So a token cannot choose how it is
checked. Replicas check what HAProxy cannot check: JSON with a repeated name, and errors that only Python's stricter
parser finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.security.tokens.verification import TokenRules
from serve_apps.edge.haproxy.answers import refuse
from serve_apps.edge.haproxy.counters import Counter
from serve_apps.edge.haproxy.keys import JwtKey

NOT_BEFORE_LEEWAY_S = 5
"""The issuer's clock may be ahead by this many seconds. The edge has no such tolerance for expiry; replicas have it."""
NOT_ACCEPTED = ('"crit"', '"b64"', '"jku"', '"jwk"', '"x5u"', '"x5c"', r"\u")
"""Text that a token's header may not contain: fields that change how the token is read, fields that contain a key, and
the escape that could hide the letters of such a field."""
MAX_AUDIENCES = 16
"""Only this many entries of a token's audience list are compared. Later entries are ignored."""
VERIFIED_S = 60
_TABLE = "verified_tokens"
VERIFIED_TOKENS = f"""backend {_TABLE}
    stick-table type binary len 32 size 20k expire {VERIFIED_S}s
"""
"""Table of the tokens (SHA-256) whose signature this worker has verified within the last minute.

A signature check costs more than the rest of the edge's work for a request. Only the result of the signature check is
stored; the claims are checked each time. After a key is removed, HAProxy reloads, and the new worker starts with an
empty table. Invalid tokens are never stored, so they cannot displace valid tokens."""


def token_checks(keys: Sequence[JwtKey], rules: TokenRules, *, role_claim: str, tenant_claim: str) -> str:
    """Return rules that refuse an invalid token with 401.

    For a valid token, the rules set `txn.claims`, `txn.role`, `txn.tenant` and `txn.exp`.

    Args:
        keys: the issuer's keys. If there are none, every token is refused.
        rules: what a token must contain.
        role_claim: the issuer's name for the role claim.
        tenant_claim: the issuer's name for the tenant claim. The claim is optional.
    """
    return "\n".join(
        (
            _read_token(rules, role_claim=role_claim, tenant_claim=tenant_claim),
            _check_header(rules),
            _check_signature(keys),
            _check_claims(rules),
        )
    )


def _read_token(rules: TokenRules, *, role_claim: str, tenant_claim: str) -> str:
    """Require a token, and read its header fields and claims into variables."""
    return f"""    {_refuse("Give a token: 'Authorization: Bearer ...'.")} unless {{ var(txn.token) -m found }}
    {_refuse(f"The token is longer than {rules.max_bytes} bytes.")} if {{ var(txn.token) -m len gt {rules.max_bytes} }}
    http-request set-var(txn.now) date()
    http-request set-var(txn.head) var(txn.token),field(1,.),ub64dec
    http-request set-var(txn.claims) var(txn.token),field(2,.),ub64dec
    http-request set-var(txn.alg) var(txn.head),json_query('$.alg')
    http-request set-var(txn.kid) var(txn.head),json_query('$.kid')
    http-request set-var(txn.iss) var(txn.claims),json_query('$.iss')
    http-request set-var(txn.aud) var(txn.claims),json_query('$.aud')
    http-request set-var(txn.role) var(txn.claims),json_query('$.{role_claim}')
    http-request set-var(txn.tenant) var(txn.claims),json_query('$.{tenant_claim}')
    http-request set-var(txn.exp) var(txn.claims),json_query('$.exp','int')
    http-request set-var(txn.nbf) var(txn.claims),json_query('$.nbf','int')"""


def _check_header(rules: TokenRules) -> str:
    """Refuse header fields and algorithms that are not accepted, before any key is used."""
    unwanted = " ".join(f"'{text}'" for text in NOT_ACCEPTED)
    return f"""    {_refuse("The token's header has fields that are not allowed.")} if {{ var(txn.head) -m sub -- {unwanted} }}
    {_refuse(f"The token is not signed with {' or '.join(rules.algorithms)}.")} unless {{ var(txn.alg) -m str {" ".join(rules.algorithms)} }}"""


def _check_signature(keys: Sequence[JwtKey]) -> str:
    """Verify the signature with the key that the token names, unless it was verified within the last minute."""
    verify = "\n".join(
        f'    http-request set-var(txn.signed) var(txn.token),jwt_verify(txn.alg,"{key.file}") '
        f"if !verified {{ var(txn.kid) -m str -- {key.kid} }} {{ var(txn.alg) -m str {key.algorithm} }}"
        for key in keys
    )
    return f"""    http-request set-var(txn.fingerprint) var(txn.token),sha2(256)
    acl verified var(txn.fingerprint),in_table({_TABLE})
    acl signed var(txn.signed) -m int 1
{verify}
    {_refuse("The token's signature is not valid.")} unless verified or signed
    http-request track-sc{int(Counter.verified_tokens)} var(txn.fingerprint) table {_TABLE} if signed"""


def _check_claims(rules: TokenRules) -> str:
    """Check issuer, audience and times. A token with a stored signature check may have expired meanwhile."""
    latest_s = rules.max_lifetime_s + rules.leeway_s
    return f"""{_for_us(rules.audience)}
    {_refuse("The token is of another issuer, or for another audience.")} unless {{ var(txn.iss) -m str -- {rules.issuer} }} for_us
    {_refuse("The token has no expiry (exp).")} unless {{ var(txn.exp) -m found }}
    {_refuse("The token has expired.")} unless {{ var(txn.exp),sub(txn.now) -m int gt 0 }}
    {_refuse(f"The token is valid for more than {rules.max_lifetime_s} s.")} if {{ var(txn.exp),sub(txn.now) -m int gt {latest_s} }}
    {_refuse("The token is not valid yet.")} if {{ var(txn.nbf),sub(txn.now) -m int gt {NOT_BEFORE_LEEWAY_S} }}"""


def _for_us(audience: str) -> str:
    """Return an ACL that is true if a token's audience is this one, or a list with this one (RFC 7519, 4.1.3).

    HAProxy can read one element of a JSON list, but not the whole list. So there is one line for each position.
    """
    elements = (f"var(txn.claims),json_query('$.aud[{index}]')" for index in range(MAX_AUDIENCES))
    return "\n".join(f"    acl for_us {value} -m str -- {audience}" for value in ("var(txn.aud)", *elements))


def _refuse(message: str) -> str:
    return f'{refuse(401, message)} hdr WWW-Authenticate "Bearer"'
