"""Shadow mode: another version gets a share of the requests; clients do not wait for it or see its answers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import http.server
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ShadowStarted, ShadowStopped
from cluster.records.edge_counts.database import evidence_engine
from cluster.records.reading import read_records, read_shadow_predictions
from cluster.records.schema import PredictionRecord
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import key_store
from cluster.settings import PlatformConfig, StorageConfig
from cluster.settings_conversion import to_plain
from serve_apps.predictor import parts as parts_module
from serve_apps.predictor import shadow as shadow_module
from serve_apps.predictor import shadow_replicas
from serve_apps.predictor.paths import Operation
from serve_apps.predictor.predictor import Predictor
from serve_apps.predictor.shadow import MAX_COPY_BYTES, MAX_WAITING, SENDERS, Shadowing, is_sampled
from serve_apps.predictor.shadow_replicas import Connections, FetchSchedule
from serve_apps.predictor.tensors import to_raw
from serve_apps.replica.edge_headers import EdgeHeaders
from serve_apps.rollout.evidence import outcomes
from serve_apps.rollout.evidence.metric_rules import Scoring, ShadowRule
from serve_apps.rollout.evidence.metric_tables import read_shadow_counts
from tests.servers.polling import wait_until
from tests.servers.ports import free_port
from tests.servers.replica import MODEL, Replica, application, running_replica, served

SIGNATURE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="age", dtype="double"),), label="y")
APP = "m-v2"
STARTED = ShadowStarted(model=MODEL, version=2, app=APP, share=100.0)
PROOF = "proof"
STOPPED = ShadowStopped(model=MODEL, version=2, reason="")


@pytest.fixture(autouse=True)
def no_ledger_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replicas read the ledger without waiting a second."""
    monkeypatch.setattr(shadow_module, "LEDGER_INTERVAL_S", 0.02)
    monkeypatch.setattr(shadow_replicas, "INTERVAL_S", 0.02)
    monkeypatch.setattr(shadow_replicas, "FIRST_RETRY_S", 0.02)


@given(st.uuids(), st.floats(0, 100), st.floats(0, 100))
def test_request_in_a_share_is_in_every_larger_one(request_id: Any, one: float, other: float) -> None:
    """For every process; all are in 100 percent, none in 0, and a request without an id in none."""
    small, large = sorted((one, other))
    assert is_sampled(str(request_id), small) <= is_sampled(str(request_id), large)
    assert is_sampled(str(request_id), 100)
    assert not is_sampled(str(request_id), 0)
    assert not is_sampled("", 100)


def test_sample_has_the_size_of_the_share() -> None:
    """Of 20,000 requests, within four standard deviations."""
    sampled = sum(is_sampled(f"00000000-0000-4000-8000-{number:012x}", 10) for number in range(20_000))
    assert abs(sampled - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5


class ShadowServer:
    """A server in place of the shadow, which records its requests and answers when it may."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.idle_s = 60.0
        self.status = 200
        """Status of the answers; 0: the connection ends without one."""
        self.num_closed = 0
        """Connections that one of both sides has ended."""
        shadow_server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self.connection.settimeout(shadow_server.idle_s)

            def finish(self) -> None:
                super().finish()
                self.connection.close()
                shadow_server.num_closed += 1

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                shadow_server.requests.append(
                    (self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                )
                shadow_server.may_answer.wait(10)
                if not shadow_server.status:
                    self.close_connection = True
                    return
                with contextlib.suppress(OSError):
                    self.send_response(shadow_server.status)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def shadow_server() -> Iterator[ShadowServer]:
    shadow_server = ShadowServer()
    yield shadow_server
    shadow_server.may_answer.set()
    shadow_server.server.shutdown()
    shadow_server.server.server_close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(tmp_path))))
    yield ledger
    ledger.close()


class MirroredReplica:
    """A replica's `Shadowing`, and requests to it."""

    def __init__(self, ledger: Ledger, address: str, *, version: int = 1) -> None:
        self.counts: Counter[str] = Counter()
        self.records: list[PredictionRecord] = []
        self.loop = asyncio.new_event_loop()
        self.address = address
        self.errors: dict[str, BaseException] = {}
        """Error of the next call of a method, by its name; each is raised once."""
        self.shadowing = Shadowing(
            model=MODEL,
            version=version,
            ledger=ledger,
            fetch_targets=self.fetch_targets,
            token=self.token,
            proof=PROOF,
            authority="",
            count=self.count,
            append=self.records.append,
        )

    def fetch_targets(self) -> dict[str, tuple[str, ...]]:
        self._fail("fetch_targets")
        return {APP: (self.address,)}

    def token(self) -> str:
        self._fail("token")
        return "own"

    def count(self, result: str) -> None:
        self._fail("count")
        self.counts.update([result])

    def _fail(self, what: str) -> None:
        if (error := self.errors.pop(what, None)) is not None:
            raise error

    def ask(self, number: int = 0, **more: str) -> bool:
        """Send a request with more values of the edge's headers; return whether a copy was made."""
        return self.send(EdgeHeaders(request_id=f"r{number}", **more), b'{"entities": [{"id": 1}]}')

    def send(self, edge: EdgeHeaders, body: bytes) -> bool:
        answer = self.shadowing.add_copy(Response(), Operation.predict, edge, body)
        if answer.background is None:
            return False
        self.loop.run_until_complete(answer.background())
        return True

    def recorded(self) -> list[PredictionRecord]:
        """Run what the senders asked the event loop for, and return the records."""
        self.loop.run_until_complete(asyncio.sleep(0))
        return self.records

    def close(self) -> None:
        self.shadowing.close()
        self.loop.close()


@pytest.fixture
def mirrored(ledger: Ledger, shadow_server: ShadowServer) -> Iterator[MirroredReplica]:
    mirrored = MirroredReplica(ledger, shadow_server.address)
    yield mirrored
    mirrored.close()


def test_shadow_starts_changes_and_stops_with_the_ledger(
    mirrored: MirroredReplica, shadow_server: ShadowServer, ledger: Ledger
) -> None:
    """No restart is needed. Requests of other models and of the shadow itself are not copied."""
    assert not mirrored.ask()
    ledger.append(ShadowStarted(model="other", version=1, app="other-v1", share=100.0), actor="t")
    ledger.append(STARTED, actor="t")
    wait_until(mirrored.ask)
    wait_until(lambda: len(shadow_server.requests) == 1)
    assert not mirrored.ask(arm="shadow")
    itself = MirroredReplica(ledger, shadow_server.address, version=2)
    wait_until(lambda: itself.shadowing._seq == ledger.head())
    assert not itself.ask()
    itself.close()
    ledger.append(STOPPED, actor="t")
    wait_until(lambda: not mirrored.ask())


def test_copy_contains_only_the_clients_body(
    mirrored: MirroredReplica, shadow_server: ShadowServer, ledger: Ledger
) -> None:
    """It has the replica's token, the time of the answer, and the edge's headers with arm and variant `shadow`."""
    ledger.append(STARTED, actor="t")
    wait_until(lambda: mirrored.ask(7, unit_hash="u", arm="control", variant="champion"))
    wait_until(lambda: len(shadow_server.requests) == 1)
    [(path, headers, body)] = shadow_server.requests
    assert path == "/m-v2/v1/models/m:predict"
    assert headers["authorization"] == "Bearer own"
    assert {name: value for name, value in headers.items() if name.startswith("x-falaj")} == {
        "x-falaj-request-id": "r7",
        "x-falaj-unit-hash": "u",
        "x-falaj-arm": "shadow",
        "x-falaj-variant": "shadow",
        "x-falaj-proof": PROOF,
    }
    assert json.loads(body).keys() == {"entities", "as_of"}


def test_hanging_shadow_costs_only_copies(
    mirrored: MirroredReplica, shadow_server: ShadowServer, ledger: Ledger
) -> None:
    """The queue fills, all other copies are dropped and counted; waiting copies are sent in the end."""
    shadow_server.may_answer.clear()
    ledger.append(STARTED, actor="t")
    wait_until(mirrored.ask)
    while len(shadow_server.requests) < SENDERS:  # each sender hangs with one
        mirrored.ask()
    before = mirrored.counts["dropped"]
    num_requests = 2 * MAX_WAITING
    assert all(mirrored.ask(number) for number in range(num_requests))
    assert mirrored.counts["dropped"] - before >= num_requests - MAX_WAITING
    shadow_server.may_answer.set()
    wait_until(lambda: mirrored.counts["sent"] == SENDERS + MAX_WAITING)


def test_failed_and_refused_copies_are_counted(
    mirrored: MirroredReplica, shadow_server: ShadowServer, ledger: Ledger
) -> None:
    """A copy with a large body is dropped."""
    shadow_server.server.shutdown()
    shadow_server.server.server_close()
    ledger.append(STARTED, actor="t")
    wait_until(mirrored.ask)
    wait_until(lambda: mirrored.counts["failed"] == 1)
    assert mirrored.send(EdgeHeaders(request_id="r"), bytes(MAX_COPY_BYTES + 1))
    assert mirrored.counts["dropped"] == 1


@pytest.mark.parametrize(
    ("status", "fault"), [(503, "copy failed"), (400, "copy refused"), (0, "copy failed"), (200, "")]
)
def test_copy_without_an_answer_is_recorded(
    mirrored: MirroredReplica, shadow_server: ShadowServer, ledger: Ledger, status: int, fault: str
) -> None:
    """With the request's rollout and unit, as evidence about the shadow. The shadow itself logs answered ones."""
    shadow_server.status = status
    ledger.append(STARTED, actor="t")
    wait_until(lambda: mirrored.ask(7, rollout="r", unit_hash="U", arm="outside"))
    wait_until(lambda: mirrored.counts["sent" if status == 200 else "refused" if status else "failed"] == 1)
    found = mirrored.recorded()
    if not fault:
        assert found == []
        return
    wait_until(lambda: bool(mirrored.recorded()))
    [record] = mirrored.records
    assert (record.version, record.arm, record.fault) == (2, "shadow", fault)
    assert (record.request_id, record.rollout, record.unit_hash) == ("r7", "r", "U")


def test_connection_closed_by_the_shadow_loses_no_copy(shadow_server: ShadowServer) -> None:
    """Serve closes a connection after 90 s without a request, so a model with few requests would lose all copies."""
    shadow_server.idle_s = 0.05
    with contextlib.closing(Connections("")) as connections:
        for number in range(1, 4):
            assert connections.post(shadow_server.address, "/", b"", {}) == 200
            wait_until(lambda number=number: shadow_server.num_closed == number)  # type: ignore[misc]
    assert len(shadow_server.requests) == 3


def test_connection_stays_open_while_its_replica_exists(shadow_server: ShadowServer) -> None:
    """Afterwards it is closed, so that no connections to replaced replicas stay open."""
    with contextlib.closing(Connections("")) as connections:
        for _ in range(3):
            assert connections.post(shadow_server.address, "/", b"", {}) == 200
        connections.close_others([shadow_server.address])
        assert shadow_server.num_closed == 0
        connections.close_others(["127.0.0.1:1"])
        wait_until(lambda: shadow_server.num_closed == 1)


def test_copies_follow_a_replaced_replica(
    shadow_server: ShadowServer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, before the next scheduled fetch."""
    monkeypatch.setattr(shadow_replicas, "INTERVAL_S", 600.0)
    mirrored = MirroredReplica(ledger, f"127.0.0.1:{free_port()}")
    ledger.append(STARTED, actor="t")
    wait_until(lambda: mirrored.ask() and mirrored.counts["failed"] > 0)
    mirrored.address = shadow_server.address
    wait_until(lambda: mirrored.ask() and mirrored.counts["sent"] > 0)
    mirrored.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("what", "error"),
    [("fetch_targets", AttributeError("a")), ("token", RuntimeError("t")), ("count", SystemExit())],
    ids=["fetching targets", "sending", "ending a thread"],
)
def test_no_error_stops_copies_for_good(
    mirrored: MirroredReplica, ledger: Ledger, what: str, error: BaseException
) -> None:
    """An unexpected error costs one copy or one fetch."""
    ledger.append(STARTED, actor="t")
    for _ in range(SENDERS):
        mirrored.errors[what] = error
        wait_until(lambda: mirrored.ask() and what not in mirrored.errors)
    before = mirrored.counts["sent"]
    wait_until(lambda: mirrored.ask() and mirrored.counts["sent"] > before + SENDERS)


def test_addresses_are_fetched_seldom_and_sooner_after_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replica fetches them, so a shadow that is down for an hour must not cause a fetch every second."""
    monkeypatch.setattr(shadow_replicas, "INTERVAL_S", 10.0)
    monkeypatch.setattr(shadow_replicas, "FIRST_RETRY_S", 1.0)
    now = 0.0
    schedule = FetchSchedule(lambda: now)

    def fetch_times(failing: bool, seconds: int) -> list[float]:
        nonlocal now
        times, end = [], now + seconds
        while now < end:
            if schedule.is_due(failing=failing):
                times.append(now)
            now += 0.5
        return times

    assert fetch_times(False, 30) == [0, 10, 20]
    assert fetch_times(True, 40) == [30, 32, 36, 44, 54, 64]
    assert fetch_times(False, 20) == [74, 84]


@contextlib.contextmanager
def running_pair(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    """Version 1 of a model, and version 2 as its shadow."""
    targets: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(parts_module, "serve_targets", lambda record: lambda: targets)
    config = PlatformConfig(storage=StorageConfig(root=str(root)))
    with running_replica(root, SIGNATURE) as replica:
        ledger = open_ledger(config)
        replica.register(SIGNATURE)
        second = Predictor(to_plain(config), MODEL, 2)
        with served(application(second, f"/{APP}", replica.failures)) as address:
            targets[APP] = (address,)
            ledger.append(STARTED, actor="t")
            yield replica
        ledger.close()


def test_shadow_predictions_are_logged_and_in_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both endpoints, also with binary tensors: joined by request id, and not among the served predictions."""
    with running_pair(tmp_path, monkeypatch) as replica:
        log, store = Path(replica.places.predictions(MODEL)), key_store(replica.keys)
        raw = to_raw("FP64", [3.0])
        tensor = {"name": "age", "datatype": "FP64", "shape": [1]}
        head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
        num_requests = 0

        def send_both() -> bool:
            nonlocal num_requests
            by_key = {"entities": [{"id": 1}], "features": {"age": 3}}
            ids = [replica.as_edge(request_id=f"r{num_requests + n}", arm="outside") for n in range(2)]
            assert replica.json("/v1/models/m:predict", by_key, headers=ids[0])[0] == 200
            length = {"Inference-Header-Content-Length": str(len(head))}
            infer = "/v2/models/m/versions/1/infer"
            assert replica.call(infer, head + raw, headers=ids[1] | length)[0] == 200
            num_requests += 2
            return read_shadow_predictions(log, store).height >= 4

        wait_until(send_both)
        shadows = read_shadow_predictions(log, store)
        answers = replica.log()
        assert set(shadows.select("version", "variant", "arm").rows()) == {(2, "shadow", "shadow")}
        assert set(answers["version"]) == {1}
        assert answers.height == num_requests
        pairs = shadows.join(answers, on="request_id", suffix="_answered")
        assert pairs.height == shadows.height
        assert pairs["value"].to_list() == pairs["value_answered"].to_list()
        assert pairs["age"].to_list() == pairs["age_answered"].to_list()
        for record in read_records(log, store):
            assert record["cpu_ms"] > 0
            assert 0 < record["took_ms"] < 10_000


def test_units_of_real_copies_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the logs of two replicas to the counts of a rollout: its rollout and its unit are in both records."""
    monkeypatch.setattr(outcomes, "MIN_COHORT_S", 0.05)
    with running_pair(tmp_path, monkeypatch) as replica:
        log, store = Path(replica.places.predictions(MODEL)), key_store(replica.keys)
        metrics = outcomes.RolloutMetrics(
            rollout="r",
            model=MODEL,
            started_at=dt.datetime.now(dt.UTC),
            scoring=Scoring(outcome_window_s=0.2, rules=(), shadow=ShadowRule(slow_ms=10_000)),
            treatment=2,
            champion=1,
        )
        numbers = itertools.count()

        def send() -> bool:
            number = next(numbers)
            said = {"request_id": f"r{number}", "arm": "outside", "rollout": "r", "unit_hash": f"U{number}"}
            body = {"entities": [{"id": 1}], "features": {"age": 3}}
            assert replica.json("/v1/models/m:predict", body, headers=replica.as_edge(**said))[0] == 200
            return read_shadow_predictions(log, store).height >= 3

        wait_until(send)
        reader = outcomes.OutcomeReader(
            replica.ledger, replica.places, store, signatures=lambda _: SIGNATURE, metrics=metrics
        )
        engine = evidence_engine(replica.ledger.engine)

        def counts() -> dict[str, int]:
            reader.collect(now=dt.datetime.now(dt.UTC))
            with engine.connect() as connection:
                return read_shadow_counts(connection, "r")

        wait_until(lambda: counts().get("units", 0) >= 3)
        assert counts().keys() == {"units"}  # no copy failed or disagreed
