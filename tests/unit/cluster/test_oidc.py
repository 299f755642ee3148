"""An OIDC issuer on loopback: its keys are fetched, kept, rotated, and not asked for more than they must be."""

from __future__ import annotations

import http.server
import json
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from joserfc.jwk import ECKey, OctKey, RSAKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.oidc import (
    MAX_DOCUMENT_BYTES,
    RemoteKeys,
    discovered,
    download,
    jwks_fetcher,
    require_safe_url,
    usable_keys,
)
from cluster.security.tokens.principal import TokenVerifier
from cluster.security.tokens.verification import TokenRules
from tests.oidc_issuer import AUDIENCE, Answer, Issuer, new_key


class Clock:
    """Seconds that pass when we say so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(issuer: Issuer, clock: Clock) -> TokenVerifier:
    keys = RemoteKeys(discovered(issuer.url, timeout_s=1), clock=clock)
    return TokenVerifier(keys, rules=TokenRules(issuer=issuer.url, audience=AUDIENCE))


def refused(verifier: TokenVerifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except Unauthenticated:
        return True
    return False


def test_an_issuers_keys_are_discovered_and_kept(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    """One fetch serves all tokens until the set is old."""
    for _ in range(3):
        assert verifier.verify(issuer.token()).subject == "alice"
    assert issuer.fetches() == 1
    clock.now += 301
    verifier.verify(issuer.token())
    assert issuer.fetches() == 2


def test_a_new_key_is_found_and_an_old_one_dropped(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    """A removed key's tokens are refused with the next fetch, though they have not expired."""
    old = issuer.token()
    verifier.verify(old)
    clock.now += 31
    issuer.keys.insert(0, new_key())
    assert verifier.verify(issuer.token()).subject == "alice"
    assert verifier.verify(old).subject == "alice"
    issuer.keys.pop()
    clock.now += 301
    assert refused(verifier, old)
    assert verifier.verify(issuer.token()).subject == "alice"


def test_strangers_cannot_make_us_hammer_the_issuer(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    """A thousand unknown keys cost one fetch per cool-down, and known ones are served meanwhile."""
    verifier.verify(issuer.token())
    strangers = [issuer.token(new_key()) for _ in range(20)]
    for second in range(100):
        clock.now += 0.6
        assert refused(verifier, strangers[second % 20])
    assert issuer.fetches() <= 3
    verifier.verify(issuer.token())


def test_the_last_good_set_holds_while_the_issuer_is_down(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    """For a day; then nobody is believed, until it is back."""
    token = issuer.token()
    verifier.verify(token)
    good, broken = issuer.answers["/jwks"], [b"", b"{", b"[]", b'{"keys":7}', b"\xff"]
    for body in broken:
        issuer.answers["/jwks"] = lambda body=body: (200, {}, body)  # type: ignore[misc]
        clock.now += 1000
        verifier.verify(token)
    issuer.answers["/jwks"] = lambda: (503, {}, b"")
    clock.now += 70_000
    verifier.verify(token)
    clock.now += 20_000
    assert refused(verifier, token)
    issuer.answers["/jwks"] = good
    clock.now += 1000
    verifier.verify(token)


def test_a_dead_issuer_is_asked_less_and_less(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """And never answers with anything but Unauthenticated."""
    issuer.answers.clear()
    for _ in range(2000):
        assert refused(verifier, issuer.token())
        clock.now += 1
    assert 3 <= len(issuer.requests) <= 10


def test_no_issuer_at_all_is_unauthenticated(clock: Clock) -> None:
    """A port that nobody listens on."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.server_close()
    with pytest.raises(Unauthenticated):
        RemoteKeys(discovered(url, timeout_s=1), clock=clock).find("k")


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://evil.example", "jwks_uri": "/jwks"},
        {"issuer": "OURS/", "jwks_uri": "/jwks"},
        {"issuer": "OURS", "jwks_uri": "http://evil.example/jwks"},
        {"issuer": "OURS", "jwks_uri": "file:///etc/passwd"},
        {"issuer": "OURS", "jwks_uri": 7},
        {"issuer": "OURS"},
        [],
        None,
    ],
    ids=str,
)
def test_a_configuration_of_somebody_else_is_not_followed(
    issuer: Issuer, verifier: TokenVerifier, document: Any
) -> None:
    """Neither to another issuer nor to an address in the clear."""
    if isinstance(document, dict):
        document = document | {"issuer": document["issuer"].replace("OURS", issuer.url)}
        if document.get("jwks_uri") == "/jwks":
            document["jwks_uri"] = f"{issuer.url}/jwks"
    issuer.answers["/.well-known/openid-configuration"] = lambda: (200, {}, json.dumps(document).encode())
    assert refused(verifier, issuer.token())
    assert issuer.fetches() == 0


def test_redirects_giants_and_dawdlers_are_given_up(issuer: Issuer) -> None:
    """Whoever answers for the issuer cannot send us elsewhere, fill our memory or hold us up."""
    issuer.answers["/moved"] = lambda: (302, {"Location": f"{issuer.url}/jwks"}, b"")
    issuer.answers["/giant"] = lambda: (200, {}, b" " * (MAX_DOCUMENT_BYTES + 1))
    stop = threading.Event()

    def dawdle() -> Answer:
        stop.wait(10)
        return 200, {}, b"{}"

    issuer.answers["/slow"] = dawdle
    with pytest.raises(OSError, match="302"):
        download(f"{issuer.url}/moved")
    with pytest.raises(ConfigError, match="larger"):
        download(f"{issuer.url}/giant")
    with pytest.raises(OSError, match="timed out"):
        download(f"{issuer.url}/slow", timeout_s=0.2)
    stop.set()
    assert issuer.fetches() == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example",
        "http://127.0.0.1.evil.example",
        "http://10.0.0.1",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "https://user:secret@issuer.example",
        "https://",
        "issuer.example",
        "http://[::1",
        "",
        None,
        7,
        b"https://issuer.example",
    ],
)
def test_addresses_that_are_not_safe_are_refused(url: Any) -> None:
    """And a password in one is not repeated."""
    with pytest.raises(ConfigError) as refusal:
        require_safe_url(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["https://issuer.example/realms/x", "http://127.0.0.1:80", "http://localhost", "http://[::1]:9"]
)
def test_addresses_that_are_safe_pass(url: str) -> None:
    """TLS anywhere, clear text on this machine."""
    require_safe_url(url)
    assert callable(jwks_fetcher(url))


def test_rs256_is_taken_where_it_is_allowed_and_nowhere_else(issuer: Issuer) -> None:
    """One key set, two rules."""
    issuer.keys = [RSAKey.generate_key(2048, {"use": "sig", "alg": "RS256"}, auto_kid=True), new_key()]

    def verifier(*algorithms: str) -> TokenVerifier:
        keys = RemoteKeys(jwks_fetcher(f"{issuer.url}/jwks"), algorithms=algorithms)
        return TokenVerifier(
            keys, rules=TokenRules(issuer=issuer.url, audience=AUDIENCE, algorithms=algorithms)
        )

    rsa, ec = (issuer.token(key) for key in issuer.keys)
    both, only_rsa, only_ec = verifier("ES256", "RS256"), verifier("RS256"), verifier("ES256")
    assert [refused(both, rsa), refused(both, ec)] == [False, False]
    assert [refused(only_rsa, rsa), refused(only_rsa, ec)] == [False, True]
    assert [refused(only_ec, rsa), refused(only_ec, ec)] == [True, False]


def test_only_keys_that_can_verify_are_taken_from_a_set() -> None:
    """No shared secret, no weak or encryption key, no curve of another size, none without a name or with another's."""
    good, other = new_key(), new_key()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weak = RSAKey.generate_key(1024, {"use": "sig"}, auto_kid=True)
    shared = OctKey.generate_key(256, {"kid": "shared"})
    p384 = ECKey.generate_key("P-384", auto_kid=True)
    encrypts = ECKey.generate_key("P-256", {"use": "enc"}, auto_kid=True)
    entries: list[Any] = [key.as_dict(private=True) for key in (good, weak, shared, p384, encrypts)]
    twice = other.as_dict(private=False) | {"kid": "twice"}
    nameless = {name: value for name, value in other.as_dict(private=False).items() if name != "kid"}
    off_curve = other.as_dict(private=False) | {"kid": "off", "y": other.as_dict(private=False)["x"]}
    broken = [7, None, {}, {"kty": "EC", "kid": "k"}, {"kty": ["EC"], "kid": "k"}, nameless, off_curve]
    document = json.dumps({"keys": [*entries, twice, twice, *broken]}).encode()
    found = usable_keys(document, ("ES256", "RS256"))
    assert list(found) == [good.kid]
    assert not found[str(good.kid)].is_private


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"{}", b'{"keys": 7}', b'{"keys": "ab"}', b'{"keys": {}}', b"[" * 100_000, b"\xff\xfe"],
)
def test_what_is_no_key_set_is_refused(document: bytes) -> None:
    """As a configuration that cannot be used."""
    with pytest.raises(ConfigError):
        usable_keys(document, ("ES256",))


@pytest.mark.parametrize("left", ["none", "another algorithm's"])
def test_keys_that_were_all_withdrawn_verify_nothing(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock, left: str
) -> None:
    """An emptied set is the issuer's word, not a failure of his, after which the last good set would hold for a day."""
    token = issuer.token()
    assert not refused(verifier, token)
    rest = [] if left == "none" else [RSAKey.generate_key(2048, auto_kid=True).as_dict(private=False)]
    issuer.answers["/jwks"] = lambda: (200, {}, json.dumps({"keys": rest}).encode())
    clock.now += 301
    assert refused(verifier, token)


def test_threads_share_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    """Many first requests at once wait for the same answer."""
    token, results = issuer.token(), []
    threads = [
        threading.Thread(target=lambda: results.append(verifier.verify(token).subject)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results, issuer.fetches()) == (["alice"] * 8, 1)
