"""Where a log is: open segments on this machine's disk, uploaded segments and the table below the storage root.

With a local storage root both are one folder, and only this machine has the log. With a remote one, each node uploads
its closed segments (`upload`), and all nodes share the uploaded segments and the table.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.records.database import ensure_tables
from cluster.settings import StorageConfig
from cluster.storage import Layout, is_uri

MAX_AGE_S = 3600.0
"""Age in seconds after which a segment is closed, if it stays on this machine."""
NODE_FILE = "node_id"
KINDS = ("predictions", "outcomes")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLocation:
    """The parts of one log."""

    name: str
    """`predictions/<model>` or `outcomes/<model>`."""
    folder: Path
    """This machine's segments."""
    shared: str | None = None
    """URI of the uploaded segments and the table; None if the log stays in `folder`."""
    engine: sa.Engine | None = None
    """The ledger's database, which holds the blocks of open segments; None if the log stays in `folder`."""

    @property
    def root(self) -> str:
        """Folder or URI of the table."""
        return self.shared or str(self.folder)

    @property
    def kind(self) -> str:
        """`predictions` or `outcomes`."""
        return self.name.partition("/")[0]


AnyLog = LogLocation | Path
"""A log. A path is the folder of a log that stays on this machine."""


def location_of(log: AnyLog) -> LogLocation:
    """Return the location of a log that may be given as its folder."""
    return LogLocation(name="/".join(log.parts[-2:]), folder=log) if isinstance(log, Path) else log


def prediction_log(places: Layout, ledger: Ledger, model: str) -> LogLocation:
    """Return where a model's prediction log is."""
    return log_location(places, ledger, f"predictions/{model}")


def outcome_log(places: Layout, ledger: Ledger, model: str) -> LogLocation:
    """Return where a model's outcome log is."""
    return log_location(places, ledger, f"outcomes/{model}")


def log_location(places: Layout, ledger: Ledger, name: str) -> LogLocation:
    """Return where a log is. With a remote storage root, the tables in the ledger's database are created."""
    if places.shared is not None:
        ensure_tables(ledger)
    return location_at(places, ledger.engine, name)


def location_at(places: Layout, engine: sa.Engine, name: str) -> LogLocation:
    """Return where a log is. The tables in the ledger's database must exist."""
    folder = Path(f"{places.disk}/{name}")
    if places.shared is None:
        return LogLocation(name=name, folder=folder)
    return LogLocation(name=name, folder=folder, shared=f"{places.shared}/{name}", engine=engine)


def max_age_s(storage: StorageConfig) -> float:
    """Return the age in seconds after which a segment is closed. It is short if others wait for its upload."""
    return storage.upload_after_s if is_uri(storage.root) else MAX_AGE_S


def local_node(disk: str) -> str:
    """Return the name of the node that owns a folder of local state. The first call creates it.

    It belongs to the folder and not to the machine, because it says whose segments are lost with the folder.
    """
    path = Path(disk) / NODE_FILE
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        pass
    Path(disk).mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{NODE_FILE}.{uuid.uuid4().hex}")
    try:
        with new.open("x") as file:
            file.write(f"{socket.gethostname()[:80]}-{uuid.uuid4().hex[:8]}\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)
    return path.read_text().strip()
