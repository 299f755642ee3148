"""The edge's certificate, as a copy of its last valid file, so that a broken file stops nothing else.

HAProxy reads certificates at every reload. If it read the original, a half-written file would also keep new replicas
away.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from pathlib import Path

from cluster.security.tokens.issuer import replace_private_file

LOG = logging.getLogger("falaj.edge")


class Certificate:
    """A certificate file that another program replaces, and our copies of it.

    Args:
        file: certificate and private key, PEM.
        folder: folder of the copies, which contain the private key, as the file does.
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
            return self._copy  # it is being replaced, or gone
        if (seen := (status.st_mtime_ns, status.st_ino)) != self._seen:
            self._seen = seen
            self._copy_if_valid()
        return self._copy

    def remove_others(self, loaded: Path) -> None:
        """Remove all copies but the loaded and the newest one: no worker will read them again."""
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
        except OSError as error:  # an SSLError is one
            LOG.error("the certificate %s is not valid, so the previous one stays: %s", self._file, error)
        else:
            self._copy = copy


def _no_password() -> str:
    """Return no password for an encrypted key, instead of the default prompt at the terminal."""
    return ""
