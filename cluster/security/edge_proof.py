"""The secret of an installation by which replicas recognise their edge.

All nodes have it: it is created once, and each node gets it when it joins. Other secrets that all edges must share are
derived from it, such as the key of units' hashes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid

from cluster.errors import ConfigError
from cluster.security.private_file import read_secret_file
from cluster.security.tokens.issuer import write_private_file
from cluster.storage import Layout, local

_FILE = "edge_proof"


def edge_proof(places: Layout) -> str:
    """Return the installation's secret. The first call creates it, and all later calls read it.

    Raises:
        ConfigError: other users can read the file, or it is empty.
    """
    path = local(places.keys) / _FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = path.with_name(f".{_FILE}.{uuid.uuid4().hex}")
        write_private_file(new, secrets.token_hex(32).encode())
        with contextlib.suppress(FileExistsError):  # another process has created it first
            os.link(new, path)
        new.unlink()
    proof = read_secret_file(path, what="the secret that the edge proves itself to replicas with")
    if not proof:  # a request without the header would prove itself
        raise ConfigError(
            f"{path} is empty. Remove it, then run `python -m cluster.down` and `python -m cluster.up`."
        )
    return proof
