"""The issuer's keys as files for HAProxy. The configuration has the `kid` and the file of each key.

A new key needs a reload, which drops no connection. A file's name is a hash of its content. So the file that an old
worker uses never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from joserfc.jwk import ECKey, RSAKey

from cluster.errors import KeysUnknown, Unauthenticated
from cluster.security.tokens.issuer import replace_private_file
from cluster.security.tokens.oidc import KeySource
from cluster.security.tokens.verification import KEY_TYPES, KID

_ALGORITHMS = {key_type: algorithm for algorithm, key_type in KEY_TYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class JwtKey:
    """A public key that verifies tokens, and the only algorithm that it may be used with."""

    kid: str
    algorithm: str
    file: str


def key_writer(source: KeySource, folder: Path) -> Callable[[], tuple[JwtKey, ...]]:
    """Return a function that writes the issuer's current keys into a folder, and returns the keys sorted by `kid`.

    The function leaves out a key if its `kid` has characters that must not get into HAProxy's configuration. It returns
    no keys if the issuer has withdrawn all keys. It raises KeysUnknown until the issuer has answered once.
    """

    def write() -> tuple[JwtKey, ...]:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            keys = source.all()
        except KeysUnknown:
            raise
        except Unauthenticated:
            return ()
        jwt_keys = []
        for kid, key in sorted(keys.items()):
            if not KID.fullmatch(kid) or not isinstance(key, ECKey | RSAKey):
                continue
            content = key.as_pem(private=False)
            file = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.pem"
            if not file.exists():
                replace_private_file(file, content)
            jwt_keys.append(JwtKey(kid=kid, algorithm=_ALGORITHMS[key.key_type], file=str(file)))
        return tuple(jwt_keys)

    return write
