"""Read secrets from files that only their owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cluster.errors import ConfigError

MAX_BYTES = 64 * 1024


def read_secret_file(path: Path, *, what: str) -> str:
    """Return the text of a file, stripped. Links are followed, because orchestrators mount secrets as links.

    Args:
        path: the file.
        what: description of the content for the error message, such as "the secret that opens Vault".

    Raises:
        ConfigError: other users can read the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not is_private(status, own=os.geteuid()):
            raise ConfigError(
                f"Other users of this machine can read {path}, {what} (mode {stat.S_IMODE(status.st_mode):04o}). Run "
                f"`chmod 600 {path}`, and replace the secret if another user may have read it."
            )
        return file.read(MAX_BYTES).decode(errors="replace").strip()


def is_private(status: os.stat_result, *, own: int) -> bool:
    """Return whether only the owner can use a file.

    Also return True for a file of root that its group can only read, because orchestrators pass secrets to processes of
    other users in this way.
    """
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IRWXO:
        return False
    given_by_root = status.st_uid == 0 != own and not mode & (stat.S_IWGRP | stat.S_IXGRP)
    return given_by_root or (status.st_uid in (own, 0) and not mode & stat.S_IRWXG)
