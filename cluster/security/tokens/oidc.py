"""An issuer's public keys, from a local JWKS file or from a URL.

A fetched key set is cached for `max_age_s`. A token with an unknown `kid` starts another fetch, but at most one per
`cooldown_s`, so that unauthenticated requests cannot overload the issuer. While the issuer is down, the last set stays
in use for at most `max_stale_s`, because it may contain a withdrawn key. A fetch blocks its caller for at most about
twice the timeout. Other threads continue with the cached set.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import logging
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key

from cluster.errors import ConfigError, KeysUnknown, Unauthenticated
from cluster.security.tokens.verification import KEY_TYPES

MAX_DOCUMENT_BYTES = 256 * 1024
MAX_KEYS = 64
TIMEOUT_S = 3.0
MIN_RSA_BITS = 2048
MAX_BACKOFF = 16
MAX_AGE_S = 300.0
_PUBLIC = {"EC": ("kty", "crv", "x", "y"), "RSA": ("kty", "n", "e")}

Fetch = Callable[[], bytes]
log = logging.getLogger(__name__)


class KeySource(Protocol):
    """Returns an issuer's public keys."""

    def find(self, kid: str) -> Key | None: ...

    def all(self) -> dict[str, Key]: ...


def usable_keys(document: bytes, algorithms: tuple[str, ...]) -> dict[str, Key]:
    """Return the public keys of a JWKS that can verify one of the algorithms, by `kid`.

    Other keys are left out (RFC 7517, section 5): unknown types, weak keys, encryption keys, keys without a `kid`, and
    keys whose `kid` is not unique. The result may be empty: the issuer has withdrawn its keys.

    Raises:
        ConfigError: the document is not a JWKS.
    """
    try:
        entries = json.loads(document)["keys"]
        if not isinstance(entries, list):
            raise TypeError(entries)
        suitable = [entry for entry in entries[:MAX_KEYS] if _is_suitable(entry, algorithms)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError("The issuer's document is not a JWK set.") from None
    kids = [entry["kid"] for entry in suitable]
    keys = {entry["kid"]: _import_key(entry) for entry in suitable if kids.count(entry["kid"]) == 1}
    usable = {kid: key for kid, key in keys.items() if key is not None}
    if not usable:
        log.warning("The issuer's JWK set has no key for %s: no token is valid.", " or ".join(algorithms))
    return usable


def _is_suitable(entry: Any, algorithms: tuple[str, ...]) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or not entry["kid"]:
        return False
    fits = any(entry.get("kty") == KEY_TYPES[name] and entry.get("alg", name) == name for name in algorithms)
    curve = "P-256" if entry.get("kty") == "EC" else None
    return fits and entry.get("use", "sig") == "sig" and entry.get("crv") == curve


def _import_key(entry: dict[str, Any]) -> Key | None:
    members: dict[str, str | list[str]] = {name: str(entry.get(name)) for name in _PUBLIC[entry["kty"]]}
    try:
        if entry["kty"] == "RSA" and _bits(str(entry.get("n"))) < MIN_RSA_BITS:
            return None
        key = JWKRegistry.import_key(members)
        _ = key.public_key  # it raises an error if the point is not on the curve
    except (JoseError, ValueError, TypeError, LookupError):  # joserfc does not convert all errors
        return None
    return key


def _bits(number: str) -> int:
    """Return the bit length of a base64url number. joserfc only warns about a short RSA key."""
    raw = base64.urlsafe_b64decode(number + "=" * (-len(number) % 4))
    return int.from_bytes(raw, "big").bit_length()


class _LoadedKeys(NamedTuple):
    version: tuple[int, int, int]
    """Modification time in ns, inode and size of the file."""
    keys: dict[str, Key]


class FileKeys:
    """The keys of a JWKS file. The file is read again after it was replaced.

    While the file is missing or invalid, no token is valid. Writers replace the file atomically, so a file is missing
    only if somebody removed it.
    """

    def __init__(self, path: Path, *, algorithms: tuple[str, ...] = ("ES256",)) -> None:
        self._path = path
        self._algorithms = algorithms
        self._loaded: _LoadedKeys | None = None

    def find(self, kid: str) -> Key | None:
        """Return the key with this `kid`, or None if the file does not have it now.

        Raises:
            Unauthenticated: the file cannot be read.
        """
        return self.all().get(kid)

    def all(self) -> dict[str, Key]:
        """Return every key, by `kid`.

        Raises:
            Unauthenticated: the file cannot be read.
        """
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_ino, status.st_size)
            loaded = self._loaded
            if loaded is None or loaded.version != version:
                loaded = _LoadedKeys(version, usable_keys(self._path.read_bytes(), self._algorithms))
                self._loaded = loaded
        except (OSError, ConfigError) as error:
            log.warning("No token can be verified: %s cannot be read: %s", self._path, error)
            raise Unauthenticated("The issuer's keys cannot be read here.") from None
        return loaded.keys


class RemoteKeys:
    """The keys of a JWKS that is fetched and cached."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        algorithms: tuple[str, ...] = ("ES256",),
        max_age_s: float = MAX_AGE_S,
        cooldown_s: float = 30.0,
        max_stale_s: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._algorithms = algorithms
        self._max_age_s, self._cooldown_s, self._max_stale_s = max_age_s, cooldown_s, max_stale_s
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: dict[str, Key] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._failures = 0

    def find(self, kid: str) -> Key | None:
        """Return the key with this `kid`, or None if the issuer does not publish it.

        Raises:
            Unauthenticated: no set was fetched within `max_stale_s`.
        """
        if kid not in self._keys:
            self._refresh()
        return self.all().get(kid)

    def all(self) -> dict[str, Key]:
        """Return every key, by `kid`.

        Raises:
            KeysUnknown: no set was ever fetched.
            Unauthenticated: no set was fetched within `max_stale_s`.
        """
        if self._age() > self._max_age_s:
            self._refresh()
        if self._fetched_at is None:
            raise KeysUnknown("The issuer's keys could not be fetched yet; try again.")
        if self._age() > self._max_stale_s:
            raise Unauthenticated("The issuer's keys cannot be fetched now; try again.")
        return self._keys

    def _age(self) -> float:
        return float("inf") if self._fetched_at is None else self._clock() - self._fetched_at

    def _refresh(self) -> None:
        """Fetch the keys, unless the last attempt was too recent.

        If another thread already fetches them, return at once; but before the first successful fetch, wait for it.
        """
        if not self._lock.acquire(blocking=self._fetched_at is None):
            return
        try:
            wait_s = self._cooldown_s * min(2 ** max(self._failures - 1, 0), MAX_BACKOFF)
            if self._tried_at is not None and self._clock() - self._tried_at < wait_s:
                return
            self._tried_at = self._clock()
            self._keys = usable_keys(self._fetch(), self._algorithms)
            self._fetched_at, self._failures = self._clock(), 0
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._failures += 1
            log.warning(
                "The issuer's keys could not be fetched (%d times in a row): %s", self._failures, error
            )
        finally:
            self._lock.release()


def jwks_fetcher(url: str, *, ca_file: str | None = None, timeout_s: float = TIMEOUT_S) -> Fetch:
    """Return a function that fetches the JWKS at a URL.

    Raises:
        ConfigError: the URL is neither https nor loopback.
    """
    require_safe_url(url)
    return lambda: download(url, ca_file=ca_file, timeout_s=timeout_s)


def discovery_fetcher(issuer: str, *, ca_file: str | None = None, timeout_s: float = TIMEOUT_S) -> Fetch:
    """Return a function that fetches an issuer's JWKS.

    Each call of that function reads the issuer's OpenID configuration, and fetches the JWKS at its `jwks_uri`. The call
    raises ConfigError if the configuration is for another issuer (OpenID Connect Discovery 1.0, 4.3).

    Raises:
        ConfigError: the issuer's URL is neither https nor loopback.
    """
    require_safe_url(issuer)

    def fetch() -> bytes:
        url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
        try:
            document = json.loads(download(url, ca_file=ca_file, timeout_s=timeout_s))
            claimed, keys_url = document["issuer"], document["jwks_uri"]
        except (TypeError, KeyError, RecursionError, json.JSONDecodeError):
            raise ConfigError(f"{url} is not an OpenID configuration.") from None
        if claimed != issuer:
            raise ConfigError(
                f"{url} is the configuration of another issuer than '{issuer}'. Use the issuer's own name as its URL."
            )
        require_safe_url(keys_url)
        return download(keys_url, ca_file=ca_file, timeout_s=timeout_s)

    return fetch


def require_safe_url(url: Any) -> None:
    """Refuse a URL through which an attacker could supply keys.

    Raises:
        ConfigError: the URL is neither https nor http to this machine, or contains a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, credentials = parts.hostname or "", parts.username or parts.password
    except (ValueError, TypeError, AttributeError):
        raise ConfigError("An issuer's address is not a URL.") from None
    safe = parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))
    if not isinstance(url, str) or not host or not safe or credentials:
        raise ConfigError(
            f"An issuer's keys must come over https (http from loopback alone), not {parts.scheme}."
        )


def download(url: str, *, ca_file: str | None = None, timeout_s: float = TIMEOUT_S) -> bytes:
    """Return a document of at most MAX_DOCUMENT_BYTES. Redirects are not followed.

    Raises:
        OSError, http.client.HTTPException: the document did not arrive within about twice the timeout.
        ConfigError: the document is too large.
    """
    deadline = time.monotonic() + timeout_s
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if _is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    if url.startswith("https"):
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
        data = b""
        while chunk := response.read1(65_536):
            data += chunk
            if len(data) > MAX_DOCUMENT_BYTES:
                raise ConfigError(f"{url} is larger than {MAX_DOCUMENT_BYTES} bytes.")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not arrive within {timeout_s} s.")
    return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirects. A redirect response raises an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
