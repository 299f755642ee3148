"""A shared log of several nodes: an S3 double, a PostgreSQL database, and a folder for each node's disk."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from cluster.ledger import Ledger
from cluster.records.blocks import BlockWriter
from cluster.records.location import LogLocation, prediction_log
from cluster.records.segments import SegmentWriter
from cluster.records.upload import Uploader
from cluster.security.keys.keyring import Keyring
from cluster.storage import Layout
from tests.samples.record_log import PERSONAL, prediction


class Killed(BaseException):
    """Simulates the end of the process. No code catches it."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node with a disk of its own."""

    places: Layout
    ledger: Ledger
    keyring: Keyring
    log: LogLocation

    def uploader(self, *, silent_s: float = 300.0) -> Uploader:
        return Uploader(self.places, self.ledger, silent_s=silent_s)

    def writer(self, **options: bool) -> SegmentWriter:
        return SegmentWriter(self.log.folder, store=self.keyring, key=PERSONAL, **options)

    def write(self, first: int, count: int) -> None:
        """Write records as one closed segment."""
        writer = self.writer()
        for number in range(first, first + count):
            writer.append(prediction(number))
        writer.close()


@dataclass(frozen=True, kw_only=True)
class SharedLogs:
    """Nodes with one storage root and one ledger."""

    folder: Path
    bucket: str
    address: str
    """Address of the ledger's database."""
    keyring: Keyring
    root: str = field(default_factory=lambda: uuid.uuid4().hex)

    def node(self, name: str) -> Node:
        places = Layout(f"{self.bucket}/{self.root}", str(self.folder / name))
        ledger = Ledger(self.address)
        return Node(
            places=places, ledger=ledger, keyring=self.keyring, log=prediction_log(places, ledger, "m")
        )


class SharedWriter:
    """Appends records as a replica with `durability=shared` does."""

    def __init__(self, node: Node) -> None:
        self._writer, self._blocks = node.writer(keep_blocks=True), BlockWriter(node.log)

    def append(self, *numbers: int) -> None:
        """Append records. Raises as `BlockWriter.add`."""
        self._writer.append(*(prediction(number) for number in numbers))
        taken = self._writer.take_blocks()
        try:
            self._blocks.add(taken.blocks)
        except Exception:
            self._writer.drop_blocks()
            raise
        finally:
            taken.close()

    def close(self) -> None:
        """Close the segment, as the end of the process does."""
        self._writer.close()
        self._blocks.close()
