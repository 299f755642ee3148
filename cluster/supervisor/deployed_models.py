"""Start the deployed models when a cluster starts.

It reads the ledger. So it is not in `head.py`, which `cluster.status` imports: that command needs no database.
"""

from __future__ import annotations

from cluster.ledger import open_ledger
from cluster.ledger.events import ModelDeployed
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.supervisor.head import RESTORE_MODULE, request_restore


def restore_models(config: PlatformConfig, record: ClusterRecord) -> None:
    """Let the supervisor start the models that should serve according to the ledger, after this command has ended."""
    if open_ledger(config).last(ModelDeployed) is None:
        return
    if config.identity.issuer.url is not None and config.identity.supervisor_token_file is None:
        print(
            f"the deployed models are not started, because identity.supervisor_token_file is not set. Run `python -m "
            f"{RESTORE_MODULE} action=restore`",
            flush=True,
        )
        return
    request_restore(record)
    print("the deployed models start next; `python -m cluster.status` shows when they serve", flush=True)
