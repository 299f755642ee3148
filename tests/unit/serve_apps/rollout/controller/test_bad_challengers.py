"""Each kind of bad challenger gets the right verdict for the right reason, at a real HAProxy.

The controller is a process. It is killed with SIGKILL after its first decision about each rollout, and started again:
this changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.database import updating
from cluster.ledger.events import (
    LedgerEvent,
    PolicyDecided,
    PolicyEnded,
    PolicyStarted,
    RollbackJournaled,
    RolloutRolledBack,
)
from cluster.metrics import new_registry
from cluster.records.edge_counts.database import evidence_engine
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.statistics.moments import Moments
from cluster.statistics.policy import REQUEST_EVENTS
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.controller import looking
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import Collector, Reader
from serve_apps.rollout.evidence.metric_tables import add_cohort
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.outage import watch
from serve_apps.rollout.outage.known import KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.watch import OutageWatch
from serve_apps.rollout.policies import count_units
from serve_apps.rollout.policy.sections import EventGuardrailSpec, StepSpec, TrafficSpec
from serve_apps.rollout.policy.spec import RolloutSpec
from serve_apps.rollout.replay import replayed_lines
from tests.processes import forks
from tests.samples.journaled import new_journal
from tests.samples.policies import WITH_POLICY, permitted
from tests.samples.rollouts import DEPLOYED, STARTED
from tests.servers.controller import CHAMPION_ONLY, Running
from tests.servers.controller import new_controller as new_edge_controller
from tests.servers.edge import PREDICT, Echo, Mirror
from tests.servers.polling import wait_until

DEADLINE_S, SLOW_S = 60.0, 0.15
SPEC = RolloutSpec(
    steps=[StepSpec(weight=50)],
    bake_s=3600,
    event_guardrails=[EventGuardrailSpec(event=event, limit=0.4) for event in REQUEST_EVENTS],
    slow_ms=1000 * SLOW_S / 2,
    traffic=TrafficSpec(units_per_hour=20_000, events=dict.fromkeys(map(str, REQUEST_EVENTS), 0.01)),
)
IMPATIENT = replace(SPEC, no_data_s=1.0)


@dataclass
class Behaviour:
    """What the challenger does with each request."""

    status: int = 200
    delay_s: float = 0.0


class Challenger(Echo):
    """A server that behaves as the test says."""

    behaviour = Behaviour()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        time.sleep(self.behaviour.delay_s)
        self.send_response(self.behaviour.status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


def act(root: Path, url: str) -> None:
    """Run the controller of rollouts and its watch for outages, until it is killed."""
    looking.EVERY_S = watch.EVERY_S = 0.1
    watch.OUTAGE_S = 1.0
    watching = OutageWatch(
        new_journal(root), KnownRollouts(root / "rollouts.known"), LocalEvidence(root / "access")
    )
    metrics, never = ControllerMetrics(new_registry()), threading.Event()
    threading.Thread(target=watching.run, args=(never, metrics.journaled.set), daemon=True).start()
    ledger = opened(url)
    store = EvidenceStore(ledger.engine)
    watching.use(store)
    controller = Controller(ledger, store, refusal=permitted)
    looking.look_until_stopped(
        controller, Leadership(ledger.engine, root / "rollouts.lock"), metrics, never, watching
    )


def opened(url: str) -> Ledger:
    """Open the ledger, also if it is locked for a long time."""
    while True:
        with contextlib.suppress(sa.exc.OperationalError):
            return Ledger(url)


@dataclass
class World:
    """An edge with two versions, and the process of the controller."""

    root: Path
    edge: Running

    def start(self) -> None:
        """Start the controller."""
        arguments = (self.root, str(self.edge.ledger.engine.url))
        self.process = forks.context().Process(target=act, args=arguments)
        self.process.start()

    def kill(self) -> None:
        """Kill the controller with SIGKILL."""
        self.process.kill()
        self.process.join()

    def begin(self, rollout: str, spec: RolloutSpec) -> None:
        """Start a rollout that follows a policy. Kill the controller after its first decision, and start it again."""
        count_units(EvidenceStore(self.edge.ledger.engine), rollout, spec)
        policy: PolicyStarted = replace(
            WITH_POLICY,
            rollout=rollout,
            plan=as_json(spec.plan()),
            traffic=as_json(spec.expected_traffic()),
            slow_ms=spec.slow_ms,
        )
        self.edge.tell_and_wait(replace(STARTED, rollout=rollout, salt=rollout, weight=50), policy)
        wait_until(lambda: self.decided(rollout) is not None, seconds=DEADLINE_S)
        self.kill()
        self.start()

    def decided(self, rollout: str) -> PolicyDecided | None:
        """Return the last decision about a rollout."""
        newest_first = reversed([entry.event() for entry in self.edge.ledger.entries(PolicyDecided)])
        decided = (event for event in newest_first if isinstance(event, PolicyDecided))
        return next((event for event in decided if event.rollout == rollout), None)

    def ended(self, kind: type[LedgerEvent], rollout: str) -> int:
        return sum(entry.payload["rollout"] == rollout for entry in self.edge.ledger.entries(kind))

    def send_until(self, is_over: Callable[[], bool]) -> None:
        """Send requests of different units until something is over."""
        token = mint_token(self.edge.places, subject="t", role=Role.service, purpose="test", ttl_s=900)
        deadline = time.monotonic() + DEADLINE_S
        connection = self.edge.connect()
        for unit in itertools.count():
            headers = {"authorization": f"Bearer {token}", "x-unit-id": str(unit)}
            connection.request("POST", PREDICT, b"{}", headers)
            connection.getresponse().read()
            if unit % 10 == 0 and is_over():
                break
            assert time.monotonic() < deadline
        connection.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("edge")
    with contextlib.ExitStack() as stack:
        champion, challenger = (stack.enter_context(Mirror(kind)) for kind in (Echo, Challenger))
        edge = stack.enter_context(new_edge_controller(root))
        edge.serve.targets = {
            "m-v1": (champion.address,),
            "m-v2": (challenger.address,),
            "outcomes": (champion.address,),
        }
        edge.settings = replace(
            edge.settings, hang_ms=20_000
        )  # a busy machine must not look like a hanging server
        edge.begin()
        edge.thread.start()
        edge.tell_and_wait(*DEPLOYED)
        reader = Reader(edge.ledger.engine, root / "access", edge="e", rotation=Rotation())
        stack.enter_context(Collector(reader, interval_s=0.1).running())
        world = World(root, edge)
        world.start()
        stack.callback(world.kill)
        yield world


@pytest.fixture(autouse=True)
def healthy() -> Iterator[None]:
    yield
    Challenger.behaviour = Behaviour()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (Behaviour(status=500), "failure"),
        (Behaviour(status=400), "refusal"),
        (Behaviour(delay_s=SLOW_S), "slow"),
    ],
)
def test_harm_rolls_back(world: World, behaviour: Behaviour, reason: str) -> None:
    """Once, with its reason, and the challenger gets no request afterwards."""
    world.begin(reason, SPEC)
    Challenger.behaviour = behaviour
    world.send_until(lambda: world.edge.split() == CHAMPION_ONLY)
    decided = world.decided(reason)
    assert decided is not None
    assert decided.verdict == "roll_back"
    assert {text.partition(":")[0] for text in decided.reasons} <= {reason, "breaker"}
    assert [world.ended(kind, reason) for kind in (RolloutRolledBack, PolicyEnded)] == [1, 1]


def test_challenger_without_requests_is_held(world: World) -> None:
    """Nothing is proven, so it stays at its step."""
    world.begin("idle", IMPATIENT)
    wait_until(lambda: verdict(world, "idle") == ("hold", ["no data"]), seconds=DEADLINE_S)
    end(world, "idle")


def test_lost_records_hold(world: World) -> None:
    """Fewer units of the challenger entered a metric than of control: the comparison is not fair."""
    world.begin("lost", SPEC)
    values = {
        arm: Moments(units=units, mean=0.2) for arm, units in ((Arm.treatment, 300), (Arm.control, 500))
    }
    with updating(evidence_engine(world.edge.ledger.engine)) as connection:
        add_cohort(connection, "lost", number=0, units=(), values={"brier": values})
    world.send_until(lambda: verdict(world, "lost") == ("hold", ["mismatch"]))
    end(world, "lost")


def test_failing_challenger_is_rolled_back_while_the_ledger_is_locked(world: World) -> None:
    """The edge follows the journal at once. The controller is killed meanwhile; the ledger gets one rollback."""
    world.begin("locked", SPEC)
    Challenger.behaviour = Behaviour(status=500)
    with world.edge.ledger.writing():
        world.send_until(lambda: world.edge.split() == CHAMPION_ONLY)
        assert [one.rollout for one in new_journal(world.root).read()] == ["locked"]
        world.kill()
        world.start()
        assert world.edge.split() == CHAMPION_ONLY
    wait_until(lambda: world.ended(PolicyEnded, "locked") == 1, seconds=DEADLINE_S)
    wait_until(lambda: new_journal(world.root).read() == (), seconds=DEADLINE_S)
    assert [world.ended(kind, "locked") for kind in (RolloutRolledBack, RollbackJournaled)] == [1, 1]
    assert world.edge.split() == CHAMPION_ONLY


def test_replay_confirms_all_decisions(world: World) -> None:
    """Also those of killed controllers."""
    lines = list(replayed_lines(world.edge.ledger.entries()))
    assert lines[-1].endswith("rollouts are as recorded")


def verdict(world: World, rollout: str) -> tuple[str, list[str]]:
    """Return the last verdict about a rollout, and the kinds of its reasons."""
    decided = world.decided(rollout)
    assert decided is not None
    return decided.verdict, [text.partition(":")[0] for text in decided.reasons]


def end(world: World, rollout: str) -> None:
    """End a rollout, as a command does."""
    world.edge.tell_and_wait(RolloutRolledBack(model="m", rollout=rollout, reason="end of the test"))
