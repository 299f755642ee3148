"""`python -m cluster.security.keys`: the key broker of this machine. `cluster.up` starts it, and SIGTERM stops it."""

from __future__ import annotations

import functools
import logging
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cluster.entrypoint import job
from cluster.host.signals import set_on_signal
from cluster.ledger import open_ledger
from cluster.ledger.events import KeyRelabelled
from cluster.metrics import new_registry, serve_metrics
from cluster.security.authorization.audit import DecisionRecorder, start_flushing
from cluster.security.authorization.policy import Action, Decision, Policy, Resource
from cluster.security.keys.broker import Broker
from cluster.security.keys.configured import open_store
from cluster.security.keys.gate import Denial, Gate, Operation
from cluster.security.keys.metrics import BrokerMetrics
from cluster.security.keys.store import KeyInfo
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.trust import Trust
from cluster.session import require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout

FLUSH_S = 60.0
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
    Operation.widen: Action.manage_keys,
}


def decide_by_all(
    policies: Iterable[Policy], principal: Principal, action: Action, key: Resource, *, environment: str
) -> Decision:
    """Return the first denial, else the last permission. A key is read in the head's region and used in the node's."""
    for policy in policies:
        decision = policy.decide(principal, action, key, environment=environment)
        if not decision.allowed:
            break
    return decision


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Serve the configured key store until SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    # The broker also starts if the head does not answer, because replicas need their keys.
    record = require_recorded_cluster(config)
    places = layout(config.storage)
    policy = Policy.load(region=config.cluster.region)
    policy_of = functools.cache(policy.in_region)
    ledger = open_ledger(config)
    decisions = DecisionRecorder(ledger.append)

    def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
        action, key = ACTIONS[operation], Resource.from_key(info)
        policies = [policy]
        if principal.node_region:
            policies.append(policy_of(principal.node_region))
        decision = decide_by_all(policies, principal, action, key, environment=config.identity.environment)
        if operation is not Operation.names:  # a list without the forbidden keys is no denial
            decisions.record_decision(principal, action, key, decision, at=time.time())
        return decision

    def audit(denial: Denial[Principal]) -> None:
        LOG.warning("%s", denial)
        if denial.principal is None:
            decisions.count_unauthenticated(denial.reason, at=time.time())

    def relabelling(principal: Principal, old: KeyInfo, new: KeyInfo) -> None:
        event = KeyRelabelled(name=new.name, was=old.plain(), becomes=new.plain())
        ledger.append(event, actor=principal.subject)

    stopped, registry = threading.Event(), new_registry()
    serve_metrics(registry, port=record.ports.get("broker_metrics"))
    gate = Gate(
        open_store(config, stopped=stopped),
        verify=Trust.of(config.identity.issuer, places).verify,
        decide=decide,
        audit=audit,
        relabelling=relabelling,
        locate=lambda principal, region: replace(principal, node_region=region),
    )
    broker = Broker(gate, Path(record.key_socket), metrics=BrokerMetrics(registry))
    flusher = start_flushing(decisions, every_s=FLUSH_S, stopped=stopped)
    set_on_signal([signal.SIGTERM], stopped)
    broker.run(stopped)
    flusher.join()
    decisions.flush()


if __name__ == "__main__":
    main()
