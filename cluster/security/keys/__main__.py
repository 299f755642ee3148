"""`python -m cluster.security.keys`: the key broker of this machine; started by `cluster.up`, ended by SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import KeyDenied
from cluster.security.identity import Principal, TokenVerifier
from cluster.security.keys.broker import Broker
from cluster.security.keys.gate import Denial, Operation
from cluster.security.keys.keyring import open_local
from cluster.security.keys.store import KeyInfo
from cluster.security.policy import Action, Decision, Policy, Resource
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, local

LOG = logging.getLogger("falaj.keys")

ACTIONS = {
    Operation.info: Action.read_metadata,
    Operation.names: Action.read_metadata,
    Operation.wrap: Action.wrap_key,
    Operation.rewrap: Action.wrap_key,
    Operation.unwrap: Action.unwrap_key,
    Operation.ensure: Action.create_key,
    Operation.rotate: Action.manage_keys,
    Operation.revoke: Action.manage_keys,
}


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Serve the keyring until SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    record = require_record(config)
    places = layout(config.storage)
    verifier, policy = TokenVerifier.of(places), Policy.load(region=config.cluster.region)
    ledger = open_ledger(config)

    def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
        environment = config.identity.environment
        return policy.decide(principal, ACTIONS[operation], Resource.of_key(info), environment=environment)

    def audit(denial: Denial[Principal]) -> None:
        LOG.warning("%s", denial)
        if denial.principal is not None:
            event = KeyDenied(
                operation=denial.operation,
                key=denial.name,
                role=denial.principal.role.value,
                purpose=denial.principal.purpose,
                policies=list(denial.policies),
            )
            ledger.append(event, actor=denial.principal.subject)

    broker = Broker(
        open_local(local(places.keys)),
        Path(record.key_socket),
        verify=verifier.verify,
        decide=decide,
        audit=audit,
    )
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    broker.run(stopped)


if __name__ == "__main__":
    main()
