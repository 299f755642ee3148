"""`python -m cluster.down`: end exactly what `cluster.up` started."""

from __future__ import annotations

from pathlib import Path

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import ClusterStopped
from cluster.node.changing import changing
from cluster.node.launch import end_all, remove_folders
from cluster.security.tokens.principal import current_actor
from cluster.session import find_record, record_path
from cluster.settings import PlatformConfig, StorageConfig


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """End the recorded cluster; it is no error when there is none."""
    record = find_record(config.storage)
    if record is None:
        print("no cluster is up")
        return
    storage = StorageConfig(root=record.storage_root)
    with changing(storage):
        ended = end_all(record)
        open_ledger(config).append(ClusterStopped(cluster_id=record.cluster_id), actor=current_actor())
        Path(record_path(storage)).unlink(missing_ok=True)
        remove_folders(record)
    print(f"ended {ended} processes of cluster {record.cluster_id}; state stays at {record.storage_root}")


if __name__ == "__main__":
    main()
