"""Keys of an OIDC issuer on loopback: fetching, caching, rotation, and limits on requests."""

from __future__ import annotations

import http.server
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from joserfc.jwk import ECKey, OctKey, RSAKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.oidc import (
    MAX_DOCUMENT_BYTES,
    RemoteKeys,
    discovery_fetcher,
    download,
    jwks_fetcher,
    require_safe_url,
    usable_keys,
)
from cluster.security.tokens.principal import TokenVerifier
from cluster.security.tokens.verification import TokenRules
from tests.servers.oidc_issuer import AUDIENCE, Answer, Issuer, new_key, refused


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(issuer: Issuer, clock: Clock) -> TokenVerifier:
    keys = RemoteKeys(discovery_fetcher(issuer.url, timeout_s=1), clock=clock)
    return TokenVerifier(keys, rules=TokenRules(issuer=issuer.url, audience=AUDIENCE))


def test_keys_are_discovered_and_cached(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """One fetch serves all tokens until the set is too old."""
    for _ in range(3):
        assert verifier.verify(issuer.token()).subject == "alice"
    assert issuer.fetches() == 1
    clock.now += 301
    verifier.verify(issuer.token())
    assert issuer.fetches() == 2


def test_new_key_is_found_and_removed_key_is_refused(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    """Tokens of a removed key are refused after the next fetch, although they have not expired."""
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


def test_unknown_keys_cause_few_fetches(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """Many tokens with unknown keys cost one fetch per cooldown. Known keys still work."""
    verifier.verify(issuer.token())
    unknown = [issuer.token(new_key()) for _ in range(20)]
    for second in range(100):
        clock.now += 0.6
        assert refused(verifier, unknown[second % 20])
    assert issuer.fetches() <= 3
    verifier.verify(issuer.token())


def test_last_valid_set_is_used_while_the_issuer_is_down(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    """For a day. Then all tokens are refused until the issuer is back."""
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


def test_requests_to_a_dead_issuer_back_off(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """Verification always raises Unauthenticated."""
    issuer.answers.clear()
    for _ in range(2000):
        assert refused(verifier, issuer.token())
        clock.now += 1
    assert 3 <= len(issuer.requests) <= 10


def test_unreachable_issuer_is_unauthenticated(clock: Clock) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.server_close()
    with pytest.raises(Unauthenticated):
        RemoteKeys(discovery_fetcher(url, timeout_s=1), clock=clock).find("k")


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://evil.example", "jwks_uri": "/jwks"},
        {"issuer": "OURS/", "jwks_uri": "/jwks"},
        *(
            {"issuer": "OURS", "jwks_uri": uri}
            for uri in ("http://evil.example/jwks", "file:///etc/passwd", 7)
        ),
        {"issuer": "OURS"},
        [],
        None,
    ],
    ids=str,
)
def test_configuration_of_another_issuer_is_refused(
    issuer: Issuer, verifier: TokenVerifier, document: Any
) -> None:
    """A configuration with an unencrypted address for the keys is refused, too."""
    if isinstance(document, dict):
        document = document | {"issuer": document["issuer"].replace("OURS", issuer.url)}
        if document.get("jwks_uri") == "/jwks":
            document["jwks_uri"] = f"{issuer.url}/jwks"
    issuer.answers["/.well-known/openid-configuration"] = lambda: (200, {}, json.dumps(document).encode())
    assert refused(verifier, issuer.token())
    assert issuer.fetches() == 0


def test_download_refuses_redirects_large_and_slow_answers(issuer: Issuer) -> None:
    """A hostile issuer cannot redirect us, fill the memory or block the caller."""
    issuer.answers["/moved"] = lambda: (302, {"Location": f"{issuer.url}/jwks"}, b"")
    issuer.answers["/giant"] = lambda: (200, {}, b" " * (MAX_DOCUMENT_BYTES + 1))
    stop = threading.Event()

    def answer_slowly() -> Answer:
        stop.wait(10)
        return 200, {}, b"{}"

    issuer.answers["/slow"] = answer_slowly
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
        *("http://issuer.example", "http://127.0.0.1.evil.example", "http://10.0.0.1", "http://[::1"),
        *("ftp://127.0.0.1", "file:///etc/passwd", "https://user:secret@issuer.example"),
        *("https://", "issuer.example", "", None, 7, b"https://issuer.example"),
    ],
)
def test_unsafe_addresses_are_refused(url: Any) -> None:
    """The message does not contain a password from the address."""
    with pytest.raises(ConfigError) as refusal:
        require_safe_url(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["https://issuer.example/realms/x", "http://127.0.0.1:80", "http://localhost", "http://[::1]:9"]
)
def test_safe_addresses_are_accepted(url: str) -> None:
    """TLS to every host, plain http to this machine only."""
    require_safe_url(url)
    assert callable(jwks_fetcher(url))


def test_only_configured_algorithms_are_accepted(issuer: Issuer) -> None:
    """The same key set with three rules."""
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


def test_only_suitable_keys_are_used() -> None:
    """Not used: shared secrets, weak keys, encryption keys, other curves, keys without a `kid` or with a duplicate
    one."""
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
    usable = usable_keys(document, ("ES256", "RS256"))
    assert list(usable) == [good.kid]
    assert not usable[str(good.kid)].is_private


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"{}", b'{"keys": 7}', b'{"keys": "ab"}', b'{"keys": {}}', b"[" * 100_000, b"\xff\xfe"],
)
def test_invalid_key_set_is_refused(document: bytes) -> None:
    with pytest.raises(ConfigError):
        usable_keys(document, ("ES256",))


@pytest.mark.parametrize("remaining", ["none", "another algorithm's"])
def test_emptied_key_set_refuses_all_tokens(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock, remaining: str
) -> None:
    """An empty set is a valid answer, not a failure. The last set is then not used."""
    token = issuer.token()
    assert not refused(verifier, token)
    entries = [] if remaining == "none" else [RSAKey.generate_key(2048, auto_kid=True).as_dict(private=False)]
    issuer.answers["/jwks"] = lambda: (200, {}, json.dumps({"keys": entries}).encode())
    clock.now += 301
    assert refused(verifier, token)


def test_threads_share_the_first_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    """Concurrent first requests wait for the same answer."""
    with ThreadPoolExecutor(8) as threads:
        principals = threads.map(verifier.verify, [issuer.token()] * 8)
    assert [principal.subject for principal in principals] == ["alice"] * 8
    assert issuer.fetches() == 1
