"""The configured key store behind its gate: tokens are verified, the policies decide, and denials are recorded."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from cluster.ledger import Ledger
from cluster.ledger.events import KeyRelabelled
from cluster.security.authorization.audit import DecisionRecorder, start_flushing
from cluster.security.authorization.policy import Action, Decision, Policy, Resource
from cluster.security.keys.configured import open_store
from cluster.security.keys.gate import Denial, Gate, Operation
from cluster.security.keys.store import KeyInfo
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.trust import Trust
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
    """Return the first denial, else the last permission.

    The broker reads a key in its own region, and the node that sent the request uses it in the node's region.
    """
    for policy in policies:
        decision = policy.decide(principal, action, key, environment=environment)
        if not decision.allowed:
            break
    return decision


@contextmanager
def guarded_store(
    config: PlatformConfig, ledger: Ledger, *, stopped: threading.Event
) -> Iterator[Gate[Principal]]:
    """Yield the gate of the configured key store. The region of this machine's policies is `cluster.region`.

    At the end, the counted denials are written to the ledger.

    Raises:
        ConfigError, Unauthenticated, KeyStoreUnavailable, RefusedError: the store cannot be opened, see `open_store`.
    """
    decisions = DecisionRecorder(ledger.append)
    gate = Gate(
        open_store(config, stopped=stopped),
        verify=Trust.of(config.identity.issuer, layout(config.storage)).verify,
        decide=_decider(config, decisions),
        audit=functools.partial(_audit, decisions),
        relabelling=functools.partial(_record_relabelling, ledger),
        locate=lambda principal, region: replace(principal, node_region=region),
    )
    flusher = start_flushing(decisions, every_s=FLUSH_S, stopped=stopped)
    try:
        yield gate
    finally:
        stopped.set()
        flusher.join()
        decisions.flush()


def _decider(
    config: PlatformConfig, decisions: DecisionRecorder
) -> Callable[[Principal, Operation, KeyInfo], Decision]:
    policy = Policy.load(region=config.cluster.region)
    policy_of = functools.cache(policy.in_region)

    def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
        action, key = ACTIONS[operation], Resource.from_key(info)
        policies = [policy]
        if principal.node_region:
            policies.append(policy_of(principal.node_region))
        decision = decide_by_all(policies, principal, action, key, environment=config.identity.environment)
        if operation is not Operation.names:  # a list without the forbidden keys is no denial
            decisions.record_decision(principal, action, key, decision, at=time.time())
        return decision

    return decide


def _audit(decisions: DecisionRecorder, denial: Denial[Principal]) -> None:
    LOG.warning("%s", denial)
    if denial.principal is None:
        decisions.count_unauthenticated(denial.reason, at=time.time())


def _record_relabelling(ledger: Ledger, principal: Principal, old: KeyInfo, new: KeyInfo) -> None:
    event = KeyRelabelled(name=new.name, was=old.plain(), becomes=new.plain())
    ledger.append(event, actor=principal.subject)
