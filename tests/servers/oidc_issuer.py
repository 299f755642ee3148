"""An OIDC issuer on loopback. It publishes its keys over HTTP, and signs tokens with them."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from cluster.errors import Unauthenticated

AUDIENCE = "falaj"
Answer = tuple[int, dict[str, str], bytes]


def new_key() -> ECKey:
    return ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, auto_kid=True)


class Issuer:
    """A real HTTP server that publishes keys, and signs tokens with them."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.answers: dict[str, Callable[[], Answer]] = {}
        self.keys: list[Any] = [new_key()]
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.requests.append(self.path)
                status, headers, body = issuer.answers.get(self.path, lambda: (404, {}, b""))()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client has closed the connection
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Print nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.answers["/jwks"] = lambda: (
            200,
            {},
            json.dumps(KeySet(self.keys).as_dict(private=False)).encode(),
        )
        self.answers["/.well-known/openid-configuration"] = self.configuration
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def configuration(self) -> Answer:
        return 200, {}, json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"}).encode()

    def token(self, key: Any = None, **changes: Any) -> str:
        key, now = key or self.keys[0], int(time.time())
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "alice",
            "role": "service",
            "exp": now + 600,
        } | changes
        alg = "RS256" if key.key_type == "RSA" else "ES256"
        return jwt.encode({"alg": alg, "kid": key.kid}, claims, key, algorithms=[alg])

    def fetches(self) -> int:
        return self.requests.count("/jwks")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def refused(verifier: Any, token: str) -> bool:
    """Return whether a verifier refuses a token."""
    try:
        verifier.verify(token)
    except Unauthenticated:
        return True
    return False
