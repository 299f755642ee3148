"""How HAProxy checks the token in `txn.token`: each of its issuer's keys for tokens of its own name and algorithm alone,
so a token cannot choose how it is checked.

Left to who stands behind the edge: a name that the JSON says twice, and what only Python's stricter reading finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.security.tokens.verification import TokenRules
from serve_apps.edge.haproxy.answers import refuse
from serve_apps.edge.haproxy.keys import JwtKey

NOT_BEFORE_LEEWAY_S = 5
"""How far ahead the issuer's clock may be; an expired token gets no leeway here, only from a replica."""
NOT_ACCEPTED = ('"crit"', '"b64"', '"jku"', '"jwk"', '"x5u"', '"x5c"', r"\u")
"""What no header may contain: fields that change how a token is read or bring a key, and their letters in disguise."""
MAX_AUDIENCES = 16
"""Of a list in a token; ours among later ones is not seen."""
VERIFIED_S = 60
VERIFIED_TOKENS = f"""backend verified_tokens
    stick-table type binary len 32 size 20k expire {VERIFIED_S}s
"""
"""Tokens by SHA-256 whose signature was found valid within the last minute, by this worker: it costs more than all else
that the edge does to a request. A key that is taken away is a reload, and a new worker remembers nothing. Only the
signature is remembered: what a token says is looked at each time. Others never get in, so nobody can push them out."""


def token_checks(keys: Sequence[JwtKey], rules: TokenRules, *, role_claim: str, tenant_claim: str) -> str:
    """Rules that refuse with 401 what does not hold, and set `txn.claims`, `txn.role`, `txn.tenant` and `txn.exp` where
    it does.

    Args:
        keys: the issuer's; without any, every token is refused.
        rules: what a token must say.
        role_claim: the issuer's name for the role.
        tenant_claim: its name for the tenant; a token may say none.
    """
    verify = "\n".join(
        f'    http-request set-var(txn.signed) var(txn.token),jwt_verify(txn.alg,"{key.file}") '
        f"if !verified {{ var(txn.kid) -m str -- {key.kid} }} {{ var(txn.alg) -m str {key.algorithm} }}"
        for key in keys
    )
    unwanted = " ".join(f"'{text}'" for text in NOT_ACCEPTED)
    latest_s = rules.max_lifetime_s + rules.leeway_s
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
    http-request set-var(txn.nbf) var(txn.claims),json_query('$.nbf','int')
    {_refuse("The token has header fields that are not accepted here.")} if {{ var(txn.head) -m sub -- {unwanted} }}
    {_refuse(f"The token is not signed with {' or '.join(rules.algorithms)}.")} unless {{ var(txn.alg) -m str {" ".join(rules.algorithms)} }}
    http-request set-var(txn.fingerprint) var(txn.token),sha2(256)
    acl verified var(txn.fingerprint),in_table(verified_tokens)
    acl signed var(txn.signed) -m int 1
{verify}
    {_refuse("The token's signature is not valid.")} unless verified or signed
    http-request track-sc3 var(txn.fingerprint) table verified_tokens if signed
{_for_us(rules.audience)}
    {_refuse("The token's issuer or audience is not ours.")} unless {{ var(txn.iss) -m str -- {rules.issuer} }} for_us
    {_refuse("The token says no expiry.")} unless {{ var(txn.exp) -m found }}
    {_refuse("The token has expired.")} unless {{ var(txn.exp),sub(txn.now) -m int gt 0 }}
    {_refuse(f"The token would hold for more than {rules.max_lifetime_s} s.")} if {{ var(txn.exp),sub(txn.now) -m int gt {latest_s} }}
    {_refuse("The token is not valid yet.")} if {{ var(txn.nbf),sub(txn.now) -m int gt {NOT_BEFORE_LEEWAY_S} }}"""


def _for_us(audience: str) -> str:
    """The condition that a token names the audience, alone or at any place of a list (RFC 7519, 4.1.3).

    HAProxy reads a list's elements, but not a list.
    """
    elements = (f"var(txn.claims),json_query('$.aud[{place}]')" for place in range(MAX_AUDIENCES))
    return "\n".join(f"    acl for_us {one} -m str -- {audience}" for one in ("var(txn.aud)", *elements))


def _refuse(message: str) -> str:
    return f'{refuse(401, message)} hdr WWW-Authenticate "Bearer"'
