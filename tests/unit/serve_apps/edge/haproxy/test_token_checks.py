"""Tokens that pass a real HAProxy, and tokens that only a replica refuses."""

from __future__ import annotations

import base64
import dataclasses
import hmac
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from cluster.errors import Unauthenticated
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.tokens.issuer import ALGORITHM, AUDIENCE, ISSUER, rotate_issuer
from cluster.security.tokens.oidc import RemoteKeys, discovery_fetcher
from cluster.security.tokens.principal import TokenVerifier, local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust, access_rules
from cluster.settings import IssuerConfig
from serve_apps.edge.haproxy.keys import key_writer
from serve_apps.replica.access import AccessCheck
from tests.servers.edge import PREDICT, Edge
from tests.servers.oidc_issuer import Issuer, new_key
from tests.servers.polling import wait_until


def forged(edge: Edge, key: Any, *, alg: str = ALGORITHM, kid: str | None = None, **changes: Any) -> str:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "t", "role": "service", "exp": now + 60, "nbf": now}
    given = {name: value for name, value in (claims | changes).items() if value is not None}
    header = {"alg": alg, "kid": edge.keys[0].kid if kid is None else kid}
    return jwt.encode(header, given, key, algorithms=[alg])


def unsigned(edge: Edge, alg: str) -> str:
    """A token whose header names an algorithm without a signature."""
    head = base64.urlsafe_b64encode(json.dumps({"alg": alg, "kid": edge.keys[0].kid}).encode())
    return f"{head.rstrip(b'=').decode()}.{edge.token().split('.')[1]}."


def resigned(edge: Edge, key: ECKey, *, header: str = "", claims: str = "") -> str:
    """A token with members added to the text of its parts, and a valid signature."""
    now = int(time.time())
    head = f'{{"alg":"ES256","kid":"{edge.keys[0].kid}"' + (f",{header}" if header else "") + "}"
    body = f'{{"iss":"{ISSUER}","aud":"{AUDIENCE}","sub":"t","role":"service","exp":{now + 60}'
    body += (f",{claims}" if claims else "") + "}"
    text = ".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in (head, body))
    private = key.private_key
    assert private is not None
    r, s = decode_dss_signature(private.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def real_key(edge: Edge) -> ECKey:
    """The key with which the edge's issuer signs."""
    return ECKey.import_key((Path(edge.places.keys) / "issuer.pem").read_bytes())


def confused(edge: Edge, public_key: bytes) -> str:
    """A token signed with HS256, with the issuer's public key as the secret."""
    claims = edge.token().split(".")[1]
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=").decode()
    mac = hmac.new(public_key, f"{head}.{claims}".encode(), "sha256").digest()
    return f"{head}.{claims}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


FORBIDDEN_HEADERS = [
    '"crit":["b64"],"b64":false',
    '"crit":["x"]',
    '"jku":"https://evil.example/jwks"',
    '"jwk":{"kty":"EC"}',
    '"x5u":"https://evil.example/cert"',
    '"x5c":[]',
    '"crit":[]',
    '"\\u0063rit":["x"]',
]


def test_invalid_tokens_are_401(edge: Edge) -> None:
    """Missing, expired, not yet valid, too large, or with forbidden header fields.

    Also tokens without a lifetime or with too long a one, and those of another issuer, audience, key or algorithm.
    """
    other = ECKey.generate_key("P-256")
    real = real_key(edge)
    public = (Path(edge.places.keys) / "issuer.pub.pem").read_bytes()
    now = int(time.time())
    tokens = [
        None,
        "",
        "a.b.c",
        edge.token(ttl_s=-5),
        forged(edge, other),
        forged(edge, real, nbf=now + 600),
        forged(edge, real, exp=None),
        forged(edge, real, iss="elsewhere"),
        forged(edge, real, aud="elsewhere"),
        forged(edge, real, aud=["elsewhere"]),
        forged(edge, real, aud=["elsewhere", f'x","{AUDIENCE}', [AUDIENCE]]),
        forged(edge, real, aud=["elsewhere"], act={"aud": AUDIENCE}),
        forged(edge, real, kid="unknown"),
        forged(edge, real, kid="../../keys/issuer.pub.pem"),
        forged(edge, real, kid=edge.keys[0].file),
        *(unsigned(edge, alg) for alg in ("none", "nOnE", "NONE", "")),
        confused(edge, public),
        f"{edge.token().rsplit('.', 1)[0]}.",
        forged(edge, real, exp=now + 30 * 86_400),
        forged(edge, real, exp=10**300),
        forged(edge, real, sub="x" * 4096),
        *(resigned(edge, real, header=header) for header in FORBIDDEN_HEADERS),
    ]
    assert [edge.call(token=token)[0] for token in tokens] == [401] * len(tokens)
    assert edge.call(token=forged(edge, real))[0] == 200
    for others in range(4):
        audiences = [*["elsewhere"] * others, AUDIENCE, "nowhere"]
        assert edge.call(token=forged(edge, real, aud=audiences))[0] == 200


def test_refusal_names_the_fault_of_the_token(edge: Edge) -> None:
    real = ECKey.import_key((Path(edge.places.keys) / "issuer.pem").read_bytes())
    week_s = 7 * 86_400
    faults = {
        forged(edge, real, exp=None): "The token has no expiry (exp).",
        forged(
            edge, real, exp=int(time.time()) + 2 * week_s
        ): f"The token is valid for more than {week_s} s.",
        forged(edge, real, aud="elsewhere"): "The token is of another issuer, or for another audience.",
        resigned(
            edge, real, header=FORBIDDEN_HEADERS[0]
        ): "The token's header has fields that are not allowed.",
    }
    for token, message in faults.items():
        assert edge.call(token=token) == (401, {"error": message, "code": 401})


def num_verified_tokens(edge: Edge) -> int:
    """Return how many valid signatures the running worker has stored."""
    head = edge.haproxy.query("show table verified_tokens").splitlines()[0]
    return int(head.rsplit("used:", 1)[1])


def test_only_the_signature_of_a_token_is_stored(edge: Edge) -> None:
    """The token still expires, its signature fits no other token, and refused tokens are not stored."""
    real = real_key(edge)
    before = num_verified_tokens(edge)
    token = forged(edge, real, exp=int(time.time()) + 2)
    assert [edge.call(token=token)[0] for _ in range(3)] == [200] * 3
    assert num_verified_tokens(edge) == before + 1
    content, signature = token.rsplit(".", 1)
    other = forged(edge, real, role="admin").rsplit(".", 1)
    assert edge.call(token=f"{content}.{other[1]}")[0] == 401
    assert edge.call(token=f"{other[0]}.{signature}")[0] == 401
    assert num_verified_tokens(edge) == before + 1
    wait_until(lambda: edge.call(token=token)[0] == 401)


@pytest.mark.parametrize(
    ("header", "claims"),
    [('"alg":"ES256"', ""), ("", '"role":"admin"'), ('"cty":"JWT"', "")],
    ids=["alg twice", "role twice", "unknown field"],
)
def test_replica_refuses_what_only_it_can_check(edge: Edge, header: str, claims: str) -> None:
    """Signed by the real key, but with ambiguous content."""
    real = real_key(edge)
    token = resigned(edge, real, header=header, claims=claims)
    check = AccessCheck(
        TokenVerifier(local_keys(edge.places)),
        policy=Policy.load(),
        resource=Resource(kind="model", name="m"),
        environment="local",
        append=lambda event, *, actor: None,
    )
    assert edge.call(token=resigned(edge, real))[0] == 200
    assert check(f"Bearer {resigned(edge, real)}", Action.predict).subject == "t"
    for refused in (token, *(resigned(edge, real, header=header) for header in FORBIDDEN_HEADERS)):
        with pytest.raises(Unauthenticated):
            check(f"Bearer {refused}", Action.predict)
    assert edge.call(token=token)[0] == 200, (
        "if the edge refuses it now, move it into test_invalid_tokens_are_401"
    )


def test_edge_takes_the_first_of_repeated_roles(edge: Edge) -> None:
    """Ray's dashboard does not check again, so this documents which one counts."""
    real = real_key(edge)
    token = resigned(edge, real, claims='"role":"admin"')
    assert edge.call("/ray/", method="GET", token=token)[0] == 403


def test_two_authorization_headers_are_refused(edge: Edge) -> None:
    """Edge and replica might read different ones."""
    connection = edge.connect()
    connection.putrequest("POST", PREDICT)
    for token in (edge.token(), edge.token(Role.admin)):
        connection.putheader("Authorization", f"Bearer {token}")
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_oidc_keys_of_both_kinds_are_accepted_and_no_others(whole: Edge, tmp_path: Path) -> None:
    """Each under its own name and algorithm; the role claim has the issuer's name."""
    issuer = Issuer()
    issuer.keys = [RSAKey.generate_key(2048, {"use": "sig"}, auto_kid=True), new_key()]
    config = IssuerConfig(url=issuer.url, role_claim="falaj_role")
    keys = key_writer(Trust.of(config, whole.places).keys, tmp_path / "keys")()
    settings = dataclasses.replace(whole.settings, tokens=access_rules(config), role_claim="falaj_role")
    whole.load_targets(keys=keys, settings=settings)
    rsa, ec_key = issuer.keys
    assert {key.algorithm for key in keys} == {"ES256", "RS256"}
    for key in (rsa, ec_key):
        wait_until(lambda key=key: whole.call(token=issuer.token(key, falaj_role="service"))[0] == 200)  # type: ignore[misc]
        assert whole.call(token=issuer.token(key))[0] == 403, "the role claim has another name here"
    crossed = jwt.encode(
        {"alg": "RS256", "kid": ec_key.kid}, {"iss": issuer.url, "aud": AUDIENCE}, rsa, algorithms=["RS256"]
    )
    for token in (crossed, issuer.token(new_key(), falaj_role="service"), whole.token()):
        assert whole.call(token=token)[0] == 401
    issuer.close()


def test_rotated_key_is_accepted_and_a_withdrawn_one_refused(whole: Edge, tmp_path: Path) -> None:
    """Of the development issuer and of an OIDC issuer, through a reload that an open connection survives."""
    issuer = Issuer()
    remote = RemoteKeys(discovery_fetcher(issuer.url), max_age_s=0, cooldown_s=0)
    old, new = issuer.keys[0], new_key()
    settings = dataclasses.replace(whole.settings, tokens=access_rules(IssuerConfig(url=issuer.url)))
    connection = whole.connect()
    assert whole.call(token=whole.token(), over=connection)[0] == 200
    for keys, good, bad in (([old], [old], [new]), ([old, new], [old, new], []), ([new], [new], [old])):
        issuer.keys = keys
        whole.load_targets(keys=key_writer(remote, tmp_path)(), settings=settings)
        wait_until(lambda good=good: all(whole.call(token=issuer.token(key))[0] == 200 for key in good))  # type: ignore[misc]
        assert [whole.call(token=issuer.token(key))[0] for key in bad] == [401] * len(bad)
    assert whole.call(token=whole.token(), over=connection)[0] in (200, 401), "the connection was cut"
    issuer.close()
    current, stolen = whole.token(), whole.token()
    rotate_issuer(whole.places, keep_s=0)
    fresh = key_writer(local_keys(whole.places), tmp_path)()
    whole.load_targets(keys=fresh)
    wait_until(lambda: whole.call(token=whole.token())[0] == 200)
    assert [whole.call(token=token)[0] for token in (current, stolen)] == [401, 401]
    whole.keys = fresh


def test_key_id_may_begin_with_a_dash(whole: Edge) -> None:
    """One thumbprint in 64 does, and HAProxy would read it as an option."""
    (key,) = whole.keys
    renamed = (dataclasses.replace(key, kid="-f"),)
    whole.load_targets(keys=renamed)
    real = real_key(whole)
    wait_until(lambda: whole.call(token=forged(whole, real, kid="-f"))[0] == 200)
    assert whole.call(token=whole.token())[0] == 401


@pytest.mark.parametrize("word", ["two words", "quote'", 'quote"', "$HOME", "#", "back\\slash", ""])
def test_issuer_name_cannot_change_the_configuration(word: str) -> None:
    """The name stands in the configuration as a bare word."""
    for values in ({"url": word}, {"url": "https://issuer.example", "audience": word}):
        with pytest.raises(ValueError, match="one word of letters"):
            IssuerConfig(**values)


def test_without_keys_every_token_is_refused(whole: Edge) -> None:
    """There are no keys before the issuer's first answer, and after it has withdrawn all keys."""
    whole.load_targets(keys=())
    wait_until(lambda: whole.call(token=whole.token())[0] == 401)
