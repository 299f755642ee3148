"""A double of HashiCorp Vault. It is NOT Vault, but a loopback server with the part of its HTTP API that Falaj uses.

The cryptography is real: Transit is AES-256-GCM, the PKI signs real certificates, JWT logins verify real signatures.
Paths, status codes and error texts are Vault's. Like Vault, it is tolerant: `v0` decrypts as `v1`, base64 may have
unused bits set, encrypting with a missing key creates the key, and rewrap has no associated data. It has no
HCL policies (a token has a list of denied paths), leases or namespaces.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import ipaddress
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import hvac  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from cluster.security.keys.vault import VaultKeyStore

Data = dict[str, Any]
_KEY_NAME = r"\w(?:[\w.-]*\w)?"  # Vault's GenericNameRegex


class Refused(Exception):
    """An error answer in Vault's format."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(*errors)
        self.status = status
        self.errors = list(errors)


@dataclass
class Token:
    """The permissions of a token and its expiry."""

    denied: tuple[str, ...] = ()
    """`<method> <path prefix>` or `<path prefix>`."""
    ttl_s: float = 3600.0
    expires_at: float = 0.0
    renewable: bool = True


@dataclass
class TransitKey:
    """A Transit key with its versions."""

    versions: dict[int, bytes]
    deletion_allowed: bool = False

    @property
    def newest(self) -> int:
        return max(self.versions)


@dataclass
class State:
    """The whole state of the double."""

    tokens: dict[str, Token] = field(default_factory=dict)
    transit: dict[str, TransitKey] = field(default_factory=dict)
    kv: dict[str, list[Data]] = field(default_factory=dict)
    approles: dict[str, str] = field(default_factory=dict)
    jwt_roles: dict[tuple[str, str], ECKey] = field(default_factory=dict)
    pki_roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sealed: bool = False
    login_ttl_s: float = 3600.0
    login_denied: tuple[str, ...] = ()
    requests: list[str] = field(default_factory=list)
    tokens_seen: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


class VaultDouble:
    """The double. During a `with` block, it serves on a free loopback port."""

    def __init__(self) -> None:
        self.state = State()
        self._ca_key = ec.generate_private_key(ec.SECP256R1())
        self.ca = _certificate("double's CA", self._ca_key.public_key(), self._ca_key, None, {}, days=10)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.root_token = self.token()

    def __enter__(self) -> VaultDouble:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def token(self, *, denied: tuple[str, ...] = (), ttl_s: float = 3600.0, renewable: bool = True) -> str:
        """Return a new token."""
        text = f"hvs.{secrets.token_urlsafe(18)}"
        self.state.tokens[text] = Token(denied, ttl_s, time.monotonic() + ttl_s, renewable)
        return text

    def answer(self, method: str, path: str, token: str, sent: Data) -> tuple[int, Data | None]:
        """Answer one request.

        Raises:
            Refused: The request is refused. The error has Vault's status and messages.
        """
        state = self.state
        with state.lock:
            state.requests.append(f"{method} {path}")
            state.tokens_seen.add(token)
            if state.sealed:
                raise Refused(503, "Vault is sealed")
            if found := re.fullmatch(r"auth/(approle|jwt|kubernetes)/login", path):
                return 200, {"auth": self._login(found[1], sent)}
            granted = state.tokens.get(token)
            if granted is None or granted.expires_at < time.monotonic():
                raise Refused(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")
            if any(path.startswith(each) or f"{method} {path}".startswith(each) for each in granted.denied):
                raise Refused(403, "1 error occurred:\n\t* permission denied\n\n")
            for pattern, serve in self._routes():
                if found := re.fullmatch(pattern, f"{method} {path}", re.ASCII):
                    return serve(granted, sent, *found.groups())
        raise Refused(404, f'no handler for route "{path}". route entry not found.')

    def _routes(self) -> list[tuple[str, Callable[..., tuple[int, Data | None]]]]:
        key = f"({_KEY_NAME})"
        return [
            (r"POST auth/token/renew-self", self._renew),
            (r"LIST transit/keys", self._list_keys),
            (rf"POST transit/keys/{key}", self._create_key),
            (rf"GET transit/keys/{key}", self._read_key),
            (rf"DELETE transit/keys/{key}", self._delete_key),
            (rf"POST transit/keys/{key}/config", self._configure_key),
            (rf"POST transit/keys/{key}/rotate", self._rotate_key),
            (rf"POST transit/encrypt/{key}", self._encrypt),
            (rf"POST transit/decrypt/{key}", self._decrypt),
            (rf"POST transit/rewrap/{key}", self._rewrap),
            (r"GET secret/data/(.+)", self._read_secret),
            (r"POST secret/data/(.+)", self._write_secret),
            (r"POST pki/issue/([\w.-]+)", self._issue),
        ]

    def _login(self, method: str, sent: Data) -> Data:
        state = self.state
        if method == "approle":
            secret_id = state.approles.get(str(sent.get("role_id")))
            if secret_id is None or not secrets.compare_digest(secret_id, str(sent.get("secret_id"))):
                raise Refused(400, "invalid role or secret ID")
        else:
            key = state.jwt_roles.get((method, str(sent.get("role"))))
            refused = Refused(403, "permission denied") if method == "kubernetes" else None
            if key is None:
                raise refused or Refused(400, f'role "{sent.get("role")}" could not be found')
            try:
                claims = jwt.decode(str(sent.get("jwt")), key, algorithms=["ES256"]).claims
                jwt.JWTClaimsRegistry(exp={"essential": True}, aud={"value": "vault"}).validate(claims)
            except (JoseError, ValueError) as error:
                raise refused or Refused(400, f"error validating token: {error}") from None
        token = self.token(ttl_s=state.login_ttl_s, denied=state.login_denied)
        return {"client_token": token, "lease_duration": int(state.login_ttl_s), "renewable": True}

    def _renew(self, granted: Token, _: Data) -> tuple[int, Data]:
        if not granted.renewable:
            raise Refused(400, "lease is not renewable")
        granted.expires_at = time.monotonic() + granted.ttl_s
        return 200, {"auth": {"lease_duration": int(granted.ttl_s), "renewable": True}}

    def _list_keys(self, *_: Any) -> tuple[int, Data]:
        if not self.state.transit:
            raise Refused(404)
        return 200, {"data": {"keys": sorted(self.state.transit)}}

    def _create_key(self, _: Token, sent: Data, name: str) -> tuple[int, Data]:
        if sent.get("type", "aes256-gcm96") != "aes256-gcm96" or sent.get("derived"):
            raise Refused(400, "the double has aes256-gcm96 keys without derivation only")
        self.state.transit.setdefault(name, TransitKey({1: secrets.token_bytes(32)}))
        return self._read_key(_, sent, name)

    def _read_key(self, _: Token, __: Data, name: str) -> tuple[int, Data]:
        key = self.state.transit.get(name)
        if key is None:
            raise Refused(404)
        times = {str(version): int(time.time()) for version in key.versions}
        data = {"name": name, "type": "aes256-gcm96", "keys": times, "latest_version": key.newest}
        return 200, {"data": {**data, "deletion_allowed": key.deletion_allowed, "exportable": False}}

    def _delete_key(self, _: Token, __: Data, name: str) -> tuple[int, None]:
        key = self.state.transit.get(name)
        if key is None:
            raise Refused(400, f"error deleting policy {name}: could not delete key; not found")
        if not key.deletion_allowed:
            raise Refused(400, f"error deleting policy {name}: deletion is not allowed for this key")
        del self.state.transit[name]
        return 204, None

    def _configure_key(self, _: Token, sent: Data, name: str) -> tuple[int, Data]:
        key = self.state.transit.get(name)
        if key is None:
            raise Refused(400, f"no existing key named {name} could be found")
        key.deletion_allowed = bool(sent.get("deletion_allowed", key.deletion_allowed))
        return self._read_key(_, sent, name)

    def _rotate_key(self, _: Token, sent: Data, name: str) -> tuple[int, Data]:
        key = self.state.transit.get(name)
        if key is None:
            raise Refused(400, "key not found")
        key.versions[key.newest + 1] = secrets.token_bytes(32)
        return self._read_key(_, sent, name)

    def _encrypt(self, _: Token, sent: Data, name: str) -> tuple[int, Data]:
        if name not in self.state.transit:
            self._create_key(_, {}, name)  # as Vault does for a token with `create`
        key = self.state.transit[name]
        plaintext = _lax_base64(sent.get("plaintext"), "failed to base64-decode plaintext")
        return self._sealed(key, plaintext, _associated(sent))

    def _decrypt(self, _: Token, sent: Data, name: str) -> tuple[int, Data]:
        return 200, {
            "data": {"plaintext": base64.b64encode(self._opened(sent, name, _associated(sent))).decode()}
        }

    def _rewrap(self, _: Token, sent: Data, name: str) -> tuple[int, Data]:
        return self._sealed(self.state.transit[name], self._opened(sent, name, None), None)

    def _sealed(self, key: TransitKey, plaintext: bytes, bound: bytes | None) -> tuple[int, Data]:
        nonce = secrets.token_bytes(12)
        sealed = base64.b64encode(nonce + AESGCM(key.versions[key.newest]).encrypt(nonce, plaintext, bound))
        return 200, {
            "data": {"ciphertext": f"vault:v{key.newest}:{sealed.decode()}", "key_version": key.newest}
        }

    def _opened(self, sent: Data, name: str, bound: bytes | None) -> bytes:
        key = self.state.transit.get(name)
        if key is None:
            raise Refused(400, "encryption key not found")
        parts = str(sent.get("ciphertext")).split(":", 2)
        if len(parts) != 3 or parts[0] != "vault" or not parts[1].startswith("v"):
            raise Refused(400, "invalid ciphertext: no prefix")
        try:
            version = int(parts[1][1:]) or 1
        except ValueError:
            raise Refused(400, "invalid ciphertext: version number could not be decoded") from None
        if version not in key.versions:
            raise Refused(400, "invalid ciphertext: version is too new")
        sealed = _lax_base64(parts[2], "invalid ciphertext: could not decode base64")
        try:
            return AESGCM(key.versions[version]).decrypt(sealed[:12], sealed[12:], bound)
        except (InvalidTag, ValueError):
            raise Refused(400, "cipher: message authentication failed") from None

    def _read_secret(self, _: Token, __: Data, path: str) -> tuple[int, Data]:
        versions = self.state.kv.get(path)
        if not versions:
            raise Refused(404)
        return 200, {
            "data": {"data": versions[-1], "metadata": {"version": len(versions), "deletion_time": ""}}
        }

    def _write_secret(self, _: Token, sent: Data, path: str) -> tuple[int, Data]:
        versions = self.state.kv.setdefault(path, [])
        if sent.get("options", {}).get("cas", len(versions)) != len(versions):
            raise Refused(400, "check-and-set parameter did not match the current version")
        versions.append(sent["data"])
        return 200, {"data": {"version": len(versions), "deletion_time": ""}}

    def _issue(self, _: Token, sent: Data, role: str) -> tuple[int, Data]:
        allowed = self.state.pki_roles.get(role)
        if allowed is None:
            raise Refused(400, f"unknown role: {role}")
        name = str(sent["common_name"])
        if name not in allowed:
            raise Refused(400, f"common name {name} not allowed by this role")
        key = ec.generate_private_key(ec.SECP256R1())
        issued = _certificate(name, key.public_key(), self._ca_key, self.ca, sent, days=1)
        return 200, {
            "data": {
                "certificate": _pem(issued),
                "issuing_ca": _pem(self.ca),
                "ca_chain": [_pem(self.ca)],
                "private_key": key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.TraditionalOpenSSL,
                    serialization.NoEncryption(),
                ).decode(),
                "private_key_type": "ec",
                "serial_number": issued.serial_number.to_bytes(20, "big").hex(":"),
                "expiration": int(issued.not_valid_after_utc.timestamp()),
            }
        }


def _handler(double: VaultDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = (
            True  # otherwise each answer waits 40 ms for the client's delayed acknowledgement
        )

        def _serve(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path).removeprefix("/v1/")
            token = self.headers.get("X-Vault-Token", "")
            method = "POST" if self.command == "PUT" else self.command
            try:
                status, data = double.answer(method, path, token, json.loads(text or b"{}"))
            except Refused as refused:
                status, data = refused.status, {"errors": refused.errors}
            body = b"" if data is None else json.dumps({"request_id": secrets.token_hex(8), **data}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_LIST = _serve

        def log_message(self, *_: object) -> None:
            """Print nothing, because tests print their own output."""

    return Handler


def _lax_base64(text: object, error: str) -> bytes:
    """Decode base64 by the rules of Go's StdEncoding: ignore line ends and unused bits, but reject other characters."""
    try:
        return base64.b64decode(re.sub(r"[\r\n]", "", str(text)), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, error) from None


def _associated(sent: Data) -> bytes | None:
    text = sent.get("associated_data")
    return None if text is None else _lax_base64(text, "failed to base64-decode associated data")


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    sent: Data,
    *,
    days: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [
        x509.DNSName(each) for each in [name, *str(sent.get("alt_names", "")).split(",")] if each
    ]
    addresses = [each for each in str(sent.get("ip_sans", "")).split(",") if each]
    names += [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
    seconds = int(str(sent.get("ttl", f"{days * 86400}s")).removesuffix("s"))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(seconds=30))
        .not_valid_after(now + dt.timedelta(seconds=seconds))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def store(double: VaultDouble, **token: Any) -> VaultKeyStore:
    """Return a client of the double's key store. It has the root token, or a new token with these properties."""
    text = double.token(**token) if token else double.root_token
    return VaultKeyStore(hvac.Client(url=double.address, token=text, timeout=5))
