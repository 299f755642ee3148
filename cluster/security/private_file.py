"""Reading a secret from a file that is nobody else's to read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cluster.errors import ConfigError

MAX_BYTES = 64 * 1024


def read_secret_file(path: Path, *, what: str) -> str:
    """The text in a file, stripped. Links are followed, because orchestrators mount secrets by them.

    Args:
        path: the file.
        what: is in it, for the message: "the secret that opens Vault".

    Raises:
        ConfigError: others can read it.
        OSError: it cannot be read at all.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not is_private(status, own=os.geteuid()):
            raise ConfigError(
                f"Others on this machine can read {path}, {what} (mode {stat.S_IMODE(status.st_mode):04o}). "
                f"`chmod 600 {path}`, and have a new one made if somebody may have read it."
            )
        return file.read(MAX_BYTES).decode(errors="replace").strip()


def is_private(status: os.stat_result, *, own: int) -> bool:
    """Whether a file is its owner's alone. What root has laid down for one of this process's groups is so, too: that is
    how an orchestrator hands a secret to a process that is not root."""
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IRWXO:
        return False
    handed = status.st_uid == 0 != own and not mode & (stat.S_IWGRP | stat.S_IXGRP)
    return handed or (status.st_uid in (own, 0) and not mode & stat.S_IRWXG)
