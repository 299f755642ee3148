"""`python -m cluster.down`: stop exactly the processes that `cluster.up` or `cluster.join` started on this machine.

On a node that joined, running work is ended at once; `cluster.leave` lets it finish first. On the head, the whole
cluster ends: the other nodes find the event in the ledger and end their processes.
"""

from __future__ import annotations

from pathlib import Path

from cluster.entrypoint import compose_platform, job
from cluster.ledger import open_ledger
from cluster.ledger.events import ClusterStopped
from cluster.membership.departure import leave_membership
from cluster.node.gcs_store import remove_state_or_warn
from cluster.node.launch import end_all, remove_folders
from cluster.node.locks import command_lock
from cluster.security.tokens.principal import current_actor
from cluster.session import find_record, record_path
from cluster.settings import PlatformConfig


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Stop the recorded cluster. If no cluster is recorded, print a line that says so, and exit 0."""
    record = find_record(config.storage)
    if record is None:
        print("no cluster is up")
        return
    with command_lock(record.storage):
        ended = end_all(record)
        if record.node_id is not None:
            leave_membership(record, compose_platform(record.overrides or ()), reason="down")
            remove_folders(record)
            print(
                f"ended {ended} processes of node {record.node_id}; it has left the cluster at {record.head}"
            )
            return
        own = compose_platform(record.overrides) if record.overrides else config
        open_ledger(own).append(ClusterStopped(cluster_id=record.cluster_id), actor=current_actor())
        Path(record_path(record.storage)).unlink(missing_ok=True)
        remove_folders(record)
        remove_state_or_warn(own.cluster.gcs, record)
    print(f"ended {ended} processes of cluster {record.cluster_id}; state stays at {record.storage_root}")


if __name__ == "__main__":
    main()
