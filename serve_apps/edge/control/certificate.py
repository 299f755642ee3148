"""The edge's certificate. HAProxy reads a copy of the last valid file, so a broken file does not stop reloads.

HAProxy reads the certificate at every reload. If it read the original, a half-written file would make a reload fail,
and HAProxy would not get new replicas.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from pathlib import Path

from cluster.security.tokens.issuer import replace_private_file

LOG = logging.getLogger("falaj.edge")


class Certificate:
    """A certificate file that another program replaces, and the edge's copies of the file.

    Args:
        file: certificate and private key, PEM.
        folder: folder of the copies. A copy contains the private key too.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._seen = (0, 0)
        self._copy = max(folder.glob("*.pem"), key=lambda path: path.stat().st_mtime_ns, default=file)

    def newest(self) -> Path:
        """Return a copy of the last valid certificate, or the file itself while there is no copy."""
        try:
            status = self._file.stat()
        except OSError:
            return self._copy  # the file is being replaced, or was removed
        if (seen := (status.st_mtime_ns, status.st_ino)) != self._seen:
            self._seen = seen
            self._copy_if_valid()
        return self._copy

    def remove_others(self, loaded: Path) -> None:
        """Remove all copies except the loaded copy and the newest copy. No worker will read the others again."""
        for path in self._folder.glob("*.pem"):
            if path not in (loaded, self._copy):
                path.unlink()

    def _copy_if_valid(self) -> None:
        try:
            content = self._file.read_bytes()
            copy = self._folder / f"{hashlib.sha256(content).hexdigest()[:16]}.pem"
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_private_file(copy, content)
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(copy, password=_no_password)
            except ssl.SSLError:
                copy.unlink()
                raise
        except OSError as error:  # SSLError is a subclass
            LOG.error("the certificate %s is not valid, so the previous one stays: %s", self._file, error)
        else:
            self._copy = copy


def _no_password() -> str:
    """Return an empty password, because otherwise an encrypted key causes a prompt at the terminal."""
    return ""
