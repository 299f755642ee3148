"""Which tokens pass a real HAProxy, and which only a replica can refuse."""

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
from cluster.security.identity import (
    ALGORITHM,
    AUDIENCE,
    ISSUER,
    TokenVerifier,
    local_keys,
)
from cluster.security.policy import Action, Policy, Resource, Role
from cluster.security.trust import Trust, access_rules
from cluster.settings import IssuerConfig
from serve_apps.access import AccessCheck
from serve_apps.edge.config import render
from serve_apps.edge.keys import written_keys
from tests.edge import PREDICT, ROLLOUT, Edge, wait_until
from tests.oidc_issuer import Issuer, new_key


def forged(edge: Edge, key: Any, *, alg: str = ALGORITHM, kid: str | None = None, **changes: Any) -> str:
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "t",
        "role": "service",
        "exp": now + 60,
        "nbf": now,
    } | changes
    return jwt.encode(
        {"alg": alg, "kid": edge.keys[0].kid if kid is None else kid},
        {k: v for k, v in claims.items() if v is not None},
        key,
        algorithms=[alg],
    )


def unsigned(edge: Edge, alg: str) -> str:
    """A token that says no signature is needed."""
    head = base64.urlsafe_b64encode(json.dumps({"alg": alg, "kid": edge.keys[0].kid}).encode())
    return f"{head.rstrip(b'=').decode()}.{edge.token().split('.')[1]}."


def resigned(edge: Edge, key: ECKey, *, header: str = "", claims: str = "") -> str:
    """A token with members added to the text of its parts, under a valid signature."""
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


def confused(edge: Edge, public_key: bytes) -> str:
    """A token signed with HS256, the issuer's public key its secret."""
    claims = edge.token().split(".")[1]
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=").decode()
    mac = hmac.new(public_key, f"{head}.{claims}".encode(), "sha256").digest()
    return f"{head}.{claims}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def test_tokens_that_must_not_pass(edge: Edge) -> None:
    """Missing, expired, not yet valid, without expiry, of another issuer, audience, key or algorithm."""
    other = ECKey.generate_key("P-256")
    real = ECKey.import_key((Path(edge.places.keys) / "issuer.pem").read_bytes())
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
        forged(edge, real, kid="unknown"),
        forged(edge, real, kid="../../keys/issuer.pub.pem"),
        forged(edge, real, kid=edge.keys[0].file),
        *(unsigned(edge, alg) for alg in ("none", "nOnE", "NONE", "")),
        confused(edge, public),
        f"{edge.token().rsplit('.', 1)[0]}.",
    ]
    assert [edge.call(token=token)[0] for token in tokens] == [401] * len(tokens)
    assert edge.call(token=forged(edge, real))[0] == 200
    assert edge.call(token=forged(edge, real, aud=[AUDIENCE, "elsewhere"]))[0] == 200


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        ('"crit":["b64"],"b64":false', ""),
        ('"jku":"https://evil.example/jwks"', ""),
        ('"x5u":"https://evil.example/cert"', ""),
        ('"alg":"ES256"', ""),
        ("", '"role":"admin"'),
    ],
    ids=["crit", "jku", "x5u", "alg twice", "role twice"],
)
def test_what_the_edge_lets_through_a_replica_refuses(edge: Edge, header: str, claims: str) -> None:
    """Signed by the real key, but saying what could be understood in two ways."""
    real = ECKey.import_key((Path(edge.places.keys) / "issuer.pem").read_bytes())
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
    with pytest.raises(Unauthenticated):
        check(f"Bearer {token}", Action.predict)


def test_two_authorization_headers_are_refused(edge: Edge) -> None:
    """Edge and replica might take different ones."""
    connection = edge.connect()
    connection.putrequest("POST", PREDICT)
    for token in (edge.token(), edge.token(Role.admin)):
        connection.putheader("Authorization", f"Bearer {token}")
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_an_oidc_issuers_keys_of_both_kinds_are_believed_and_nobody_elses(
    whole: Edge, tmp_path: Path
) -> None:
    """Each under its own name and algorithm; a role under the name that the issuer gives it."""
    issuer = Issuer()
    issuer.keys = [RSAKey.generate_key(2048, {"use": "sig"}, auto_kid=True), new_key()]
    config = IssuerConfig(url=issuer.url, role_claim="falaj_role")
    keys = written_keys(Trust.of(config, whole.places).keys, tmp_path / "keys")()
    settings = dataclasses.replace(whole.settings, tokens=access_rules(config), role_claim="falaj_role")
    whole.haproxy.load(render(whole.routes(ROLLOUT), keys, settings))
    rsa, ec_key = issuer.keys
    assert {key.algorithm for key in keys} == {"ES256", "RS256"}
    for key in (rsa, ec_key):
        wait_until(lambda key=key: whole.call(token=issuer.token(key, falaj_role="service"))[0] == 200)  # type: ignore[misc]
        assert whole.call(token=issuer.token(key))[0] == 403, "its role has another name here"
    crossed = jwt.encode(
        {"alg": "RS256", "kid": ec_key.kid}, {"iss": issuer.url, "aud": AUDIENCE}, rsa, algorithms=["RS256"]
    )
    for token in (crossed, issuer.token(new_key(), falaj_role="service"), whole.token()):
        assert whole.call(token=token)[0] == 401
    issuer.close()


def test_without_keys_every_token_is_refused(whole: Edge) -> None:
    """While an issuer has not answered yet, or its keys were taken away."""
    whole.haproxy.load(render(whole.routes(ROLLOUT), (), whole.settings))
    wait_until(lambda: whole.call(token=whole.token())[0] == 401)
