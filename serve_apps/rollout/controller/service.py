"""`python -m serve_apps.rollout.controller.service`: the controller of rollouts.

`cluster.up` and `cluster.join` start it on each machine with an edge, and the supervisor keeps it alive. One of them
acts.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

import sqlalchemy as sa

from cluster.entrypoint import job
from cluster.errors import ConfigError, FalajError, first_line
from cluster.host.http_socket import listening
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.database import is_shared
from cluster.metrics import new_registry, serve_metrics
from cluster.node.locks import hold_lock
from cluster.node.scheduling import wait_for_turn
from cluster.registry import Registry
from cluster.security.authorization.audit import DecisionRecorder, start_flushing
from cluster.security.authorization.policy import Policy
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord, record_path, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout, local
from serve_apps.deployed_settings import idle_cost
from serve_apps.rollout.capacity.scaling import StepScaling
from serve_apps.rollout.capacity.serve import serve_capacities
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.delivering import Deliverer
from serve_apps.rollout.controller.ending import ApplicationEnder, end_command
from serve_apps.rollout.controller.http import RolloutApi
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.looking import look_until_stopped
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.controller.operations import RolloutOperations
from serve_apps.rollout.controller.rights import StarterRights
from serve_apps.rollout.controller.steady_state import SteadyState
from serve_apps.rollout.controller.watching import compared_runs
from serve_apps.rollout.controller.webhook import configured_webhook
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.history import read_running
from serve_apps.rollout.outage.journal import journal_of
from serve_apps.rollout.outage.known import KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.watch import OutageWatch

RETRY_S = 1.0
FLUSH_S = 60.0
LOG = logging.getLogger("falaj.rollouts")


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Look at the rollouts until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    wait_for_turn()
    record, stopped = require_recorded_cluster(config), threading.Event()
    set_on_signal([signal.SIGTERM], stopped)
    apply_cluster_record(record, config)
    registry = new_registry()
    metrics = ControllerMetrics(registry)
    serve_metrics(registry, port=record.ports.get("rollouts_metrics"))
    refusal = (
        "Another controller of rollouts (pid {pid}) runs for {folder}. `python -m cluster.status` shows it."
    )
    with hold_lock(Path(record_path(config.storage)).with_name("rollout-controller.lock"), refusal):
        watch = new_watch(config)
        arguments = (stopped, metrics.journaled.set)
        threading.Thread(target=watch.run, args=arguments, name="outage", daemon=True).start()
        run(config, record, metrics, stopped, watch)


def new_watch(config: PlatformConfig) -> OutageWatch:
    """Return the watch for outages of the ledger. It works before the ledger could be opened."""
    places = layout(config.storage)
    journal = journal_of(places)
    try:
        journal.reserve()
    except (ConfigError, OSError) as error:
        LOG.warning("no room is reserved for rollbacks during an outage of the ledger: %s", error)
    known = KnownRollouts(Path(record_path(config.storage)).with_name("rollouts.known"))
    return OutageWatch(journal, known, LocalEvidence(local(places.edge) / "access"))


def run(
    config: PlatformConfig,
    record: ClusterRecord,
    metrics: ControllerMetrics,
    stopped: threading.Event,
    watch: OutageWatch,
) -> None:
    """Answer requests and look at the rollouts until `stopped` is set."""
    while not stopped.is_set():
        try:
            ledger = open_ledger(config)
            store = EvidenceStore(ledger.engine)
        except sa.exc.SQLAlchemyError as error:
            LOG.warning("the ledger cannot be opened: %s", first_line(error))
            stopped.wait(RETRY_S)
            continue
        steady = SteadyState(ledger, config.rollouts.steady_state, metrics.out_of_bounds)
        controller, operations = (
            new_controller(
                config, ledger, store, scaling=StepScaling(ledger, serve_capacities(record)), steady=steady
            ),
            new_operations(config, record, ledger, store),
        )
        watch.use(None if is_shared(ledger.engine) else store)
        lock = Path(record_path(config.storage)).with_name("rollouts.lock")
        flusher = start_flushing(operations.decisions, every_s=FLUSH_S, stopped=stopped)
        if record.node_id is None:
            ender = ApplicationEnder(ledger, end_command(config, record))
            threading.Thread(target=ender.run, args=(stopped,), name="ending", daemon=True).start()
        if record.node_id is None and config.identity.issuer.url is None:
            arguments = (record, ledger, operations.registry, stopped)
            threading.Thread(target=read_outcomes, args=arguments, name="outcomes", daemon=True).start()
        leadership = Leadership(ledger.engine, lock)
        start_delivering(config, ledger, leadership, metrics, stopped)
        with listening(RolloutApi(operations).app(), Path(record.rollouts_socket)):
            look_until_stopped(controller, leadership, metrics, stopped, watch)
        flusher.join(RETRY_S)


def start_delivering(
    config: PlatformConfig,
    ledger: Ledger,
    leadership: Leadership,
    metrics: ControllerMetrics,
    stopped: threading.Event,
) -> None:
    """Send events to the configured webhook in a thread, while this controller acts."""
    webhook = configured_webhook(config)
    if webhook is None:
        return
    deliverer = Deliverer(ledger, webhook, acts=lambda: leadership.acts, waiting=metrics.webhook_waiting)
    threading.Thread(target=deliverer.run, args=(stopped,), name="webhook", daemon=True).start()


def read_outcomes(
    record: ClusterRecord, ledger: Ledger, registry: Registry, stopped: threading.Event
) -> None:
    """Read outcomes for the rollouts' metrics until `stopped` is set.

    It first waits for a rollout with metrics, because reading needs Arrow, delta-rs and the runtime of models.
    """
    while not stopped.wait(RETRY_S):
        try:
            if any(compared_runs(read_running(ledger))):
                break
        except (sa.exc.SQLAlchemyError, FalajError) as error:
            LOG.warning("the rollouts could not be read: %s", first_line(error))
    else:
        return
    from serve_apps.rollout.controller.outcomes import OutcomeCollector, keys_of, registered_versions

    versions = registered_versions(registry)
    OutcomeCollector(ledger, record.layout, versions, lambda starter: keys_of(record, starter)).run(stopped)


def new_controller(
    config: PlatformConfig,
    ledger: Ledger,
    store: EvidenceStore,
    *,
    scaling: StepScaling | None = None,
    steady: SteadyState | None = None,
) -> Controller:
    """Return the controller, with the cluster's policies."""
    rights = StarterRights(
        Registry(ledger, layout(config.storage)),
        Policy.load(region=config.cluster.region),
        region=config.cluster.region,
        environment=config.identity.environment,
    )
    return Controller(ledger, store, refusal=rights.refusal, scaling=scaling, steady=steady)


def new_operations(
    config: PlatformConfig, record: ClusterRecord, ledger: Ledger, store: EvidenceStore
) -> RolloutOperations:
    """Return the operations of callers, with the cluster's identity settings."""
    return RolloutOperations(
        ledger=ledger,
        store=store,
        registry=Registry(ledger, layout(config.storage)),
        trust=Trust.of(config.identity.issuer, record.layout),
        policy=Policy.load(region=config.cluster.region),
        region=config.cluster.region,
        environment=config.identity.environment,
        decisions=DecisionRecorder(ledger.append),
        cost=lambda app: idle_cost(config, app),
    )


if __name__ == "__main__":
    main()
