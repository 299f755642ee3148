"""The source of a process's own token: a file that another process renews, or this machine's development issuer.

A `TokenSource` is plain data, so a driver can send it to its workers. The token itself is never in a runtime
environment.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Unauthenticated
from cluster.security.private_file import read_secret_file
from cluster.security.tokens.issuer import TOKEN_TTL_S, mint_token
from cluster.security.tokens.roles import Role
from cluster.storage import Layout

INTENTS = "intents"
"""Folder below `keys/` with the intents of running jobs."""
RENEW_S = 300
"""Seconds after which a process renews its own token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSource:
    """Source of a token."""

    file: str | None = None
    """A file with the token. The file is read again for every use."""
    intent: str = ""
    """Name of a job's intent in the folder `keys/intents` below `root`, which the job keeps fresh."""
    root: str = ""
    """The node's own folder (`Layout.disk`) with the intent or the development issuer's keys, if there is no file."""
    subject: str = ""
    role: Role = Role.service
    purpose: str = ""

    def token(self) -> str:
        """Return a token that is valid now.

        Raises:
            Unauthenticated: the file cannot be read.
            ConfigError: other users can read the file, or there is no development issuer.
        """
        path = self.path()
        if path is None:
            return _mint(self, int(time.time()) // RENEW_S)
        try:
            return read_secret_file(path, what="a token")
        except OSError as error:
            raise Unauthenticated(f"The token cannot be read: {error}. Check identity.token_file.") from error

    def path(self) -> Path | None:
        """Return the file with the token, or None if the development issuer mints it."""
        if self.intent:
            return Path(Layout(self.root).keys) / INTENTS / self.intent
        return None if self.file is None else Path(self.file)


@functools.lru_cache(maxsize=16)
def _mint(source: TokenSource, period: int) -> str:
    """Return a token of the development issuer. It is cached for one period of `RENEW_S` seconds."""
    return mint_token(
        Layout(source.root),
        subject=source.subject,
        role=source.role,
        purpose=source.purpose,
        ttl_s=TOKEN_TTL_S,
    )
