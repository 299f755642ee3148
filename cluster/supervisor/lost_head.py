"""A cluster whose head has ended: whether a new head can continue it, and the event of its end."""

from __future__ import annotations

import sqlalchemy as sa

from cluster.entrypoint import compose_platform
from cluster.errors import ConfigError, FalajError, first_line
from cluster.ledger import open_ledger
from cluster.ledger.events import ClusterStopped
from cluster.membership.members import current_members
from cluster.node.gcs_store import has_state
from cluster.security.tokens.principal import current_actor
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig


def has_saved_state(record: ClusterRecord) -> bool:
    """Return whether Redis has the state of a cluster whose head has ended without `cluster.down`.

    Raises:
        ConfigError: Redis does not answer.
    """
    if record.overrides is None:
        return False
    try:
        return has_state(compose_platform(record.overrides).cluster.gcs, record)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Cluster {record.cluster_id} can go on only with its state. To start another cluster, run "
            "`python -m cluster.down` first."
        ) from None


def has_other_nodes(record: ClusterRecord) -> bool:
    """Return whether other nodes belong to a head's cluster according to the ledger.

    Raises:
        ConfigError: The ledger's database does not answer.
    """
    if not record.has_nodes:
        return False
    config = compose_platform(record.overrides or ())
    try:
        return bool(current_members(open_ledger(config), record.cluster_id))
    except sa.exc.SQLAlchemyError as error:
        raise ConfigError(
            "The ledger's database does not answer, so this machine cannot find out whether other nodes belong to "
            f"this cluster: {first_line(error.__cause__ or error)}. Start it first."
        ) from None


def record_end(config: PlatformConfig, record: ClusterRecord) -> None:
    """Append the event that a cluster has ended, unless the ledger has it. Its nodes read it, and end their processes.

    If the ledger does not answer, print a warning. The next start needs the ledger, and its event also ends the nodes.
    """
    try:
        ledger = open_ledger(compose_platform(record.overrides) if record.overrides else config)
        last = ledger.last(ClusterStopped)
        if last is None or last.payload["cluster_id"] != record.cluster_id:
            ledger.append(ClusterStopped(cluster_id=record.cluster_id), actor=current_actor())
    except (sa.exc.SQLAlchemyError, FalajError, OSError) as error:
        print(
            f"warning: the end of cluster {record.cluster_id} is not recorded: {first_line(error)}",
            flush=True,
        )
