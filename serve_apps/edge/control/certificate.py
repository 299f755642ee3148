"""The edge's certificate: a copy of the last one that held, so that a broken file stops nothing else.

HAProxy reads certificates at every reload. Were it given the file itself, one that is half written would keep new
replicas away, too.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from pathlib import Path

from cluster.security.tokens.issuer import replace_private

LOG = logging.getLogger("falaj.edge")


class Certificate:
    """A file that somebody else replaces, and our copies of it.

    Args:
        file: certificate and private key, PEM.
        folder: of the copies; a private key lies there as it does in the file.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._seen = (0, 0)
        self._copy = max(folder.glob("*.pem"), key=lambda path: path.stat().st_mtime_ns, default=file)

    def newest(self) -> Path:
        """A copy of the last one that held; the file itself while there was none."""
        try:
            status = self._file.stat()
        except OSError:
            return self._copy  # it is being replaced, or gone
        if (seen := (status.st_mtime_ns, status.st_ino)) != self._seen:
            self._seen = seen
            self._take()
        return self._copy

    def forget_others(self, loaded: Path) -> None:
        """Remove all copies but the one that was loaded and the newest: no worker will read them again."""
        for path in self._folder.glob("*.pem"):
            if path not in (loaded, self._copy):
                path.unlink()

    def _take(self) -> None:
        try:
            content = self._file.read_bytes()
            copy = self._folder / f"{hashlib.sha256(content).hexdigest()[:16]}.pem"
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_private(copy, content)
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(copy, password=_no_password)
            except ssl.SSLError:
                copy.unlink()
                raise
        except OSError as error:  # an SSLError is one
            LOG.error("the certificate at %s is no good, the one before stays: %s", self._file, error)
        else:
            self._copy = copy


def _no_password() -> str:
    """Instead of asking at the terminal for that of an encrypted key."""
    return ""
