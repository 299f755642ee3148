"""Where a process takes its own token from: a file that somebody keeps fresh, or the dev issuer of this machine.

Plain data, so that a driver can hand it to its workers; the token itself never travels in a runtime environment.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Unauthenticated
from cluster.security.private_file import read_secret_file
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.storage import Layout

TTL_S = 900
RENEW_S = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSource:
    """How to come to a token."""

    file: str | None = None
    """A file with the token, read anew for every use."""
    root: str = ""
    """Storage root of the dev issuer, where there is no file."""
    subject: str = ""
    role: Role = Role.service
    purpose: str = ""

    def token(self) -> str:
        """A token that is valid now.

        Raises:
            Unauthenticated: the file cannot be read.
            ConfigError: others can read the file; or there is no dev issuer.
        """
        if self.file is None:
            return _minted(self, int(time.time()) // RENEW_S)
        try:
            return read_secret_file(Path(self.file), what="a token")
        except OSError as error:
            raise Unauthenticated(f"The token cannot be read: {error}. See identity.token_file.") from error


@functools.lru_cache(maxsize=16)
def _minted(source: TokenSource, period: int) -> str:
    return mint_token(
        Layout(source.root), subject=source.subject, role=source.role, purpose=source.purpose, ttl_s=TTL_S
    )
