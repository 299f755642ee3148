"""The beginning and the end of a node's part in logs below a remote storage root."""

from __future__ import annotations

import sys

import sqlalchemy as sa

from cluster.errors import FalajError, first_line
from cluster.ledger import open_ledger
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig


def announce_node(config: PlatformConfig, record: ClusterRecord) -> None:
    """Let readers of logs wait for this node's records. Call it before Ray starts. Local logs need no announcement."""
    if record.layout.shared is not None:
        # Imported here, because it imports Arrow and delta-rs, and only a remote storage root needs it.
        from cluster.records.upload import Uploader

        Uploader(record.layout, open_ledger(config)).announce()


def upload_logs(config: PlatformConfig, record: ClusterRecord) -> None:
    """Upload the last segments of this node's logs. If that fails, a warning is printed and the segments stay."""
    from cluster.records.upload import Uploader

    try:
        Uploader(record.layout, open_ledger(config)).leave()
    except (FalajError, OSError, sa.exc.SQLAlchemyError) as error:
        print(
            f"warning: some records stay on this machine only, below {record.local_root}. {first_line(error)}",
            file=sys.stderr,
        )
