"""Shadow mode: another version sees a share of the requests; no client waits for it, sees it, or is seen by it."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ShadowStarted, ShadowStopped
from cluster.records import read_shadow_predictions
from cluster.registry import Lineage, Registry
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import key_store
from cluster.settings import PlatformConfig, StorageConfig, to_plain
from serve_apps.predictor import parts as parts_module
from serve_apps.predictor import shadow as shadow_module
from serve_apps.predictor import shadow_replicas
from serve_apps.predictor.paths import Operation
from serve_apps.predictor.predictor import Predictor
from serve_apps.predictor.shadow import MAX_COPY_BYTES, MAX_WAITING, SENDERS, Shadowing, is_sampled
from serve_apps.predictor.shadow_replicas import Connections, FetchSchedule
from serve_apps.predictor.tensors import to_raw
from serve_apps.replica.edge_headers import EdgeHeaders
from tests.ports import free_port
from tests.replica import MODEL, Replica, application, running_replica, served, write_model

SIGNATURE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="age", dtype="double"),), label="y")
APP = "m-v2"
STARTED = ShadowStarted(model=MODEL, version=2, app=APP, share=100.0)
PROOF = "proof"
STOPPED = ShadowStopped(model=MODEL, version=2, reason="")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits a second for the ledger."""
    monkeypatch.setattr(shadow_module, "LEDGER_INTERVAL_S", 0.02)
    monkeypatch.setattr(shadow_replicas, "INTERVAL_S", 0.02)
    monkeypatch.setattr(shadow_replicas, "FIRST_S", 0.02)


def wait_until(said: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not said():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)


@given(st.uuids(), st.floats(0, 100), st.floats(0, 100))
def test_a_request_of_a_share_is_of_every_larger_one(request_id: Any, one: float, other: float) -> None:
    """Whoever asks; all are of 100 percent, none of 0, and one without an id of none."""
    small, large = sorted((one, other))
    assert is_sampled(str(request_id), small) <= is_sampled(str(request_id), large)
    assert is_sampled(str(request_id), 100)
    assert not is_sampled(str(request_id), 0)
    assert not is_sampled("", 100)


def test_a_share_is_that_part_of_the_requests() -> None:
    """Of 20,000, within four standard deviations."""
    sampled = sum(is_sampled(f"00000000-0000-4000-8000-{number:012x}", 10) for number in range(20_000))
    assert abs(sampled - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5


class Heard:
    """A server in the shadow's place, which notes what reaches it and answers when it may."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.idle_s = 60.0
        self.num_closed = 0
        """Connections that one of both sides has ended."""
        heard = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self.connection.settimeout(heard.idle_s)

            def finish(self) -> None:
                super().finish()
                self.connection.close()
                heard.num_closed += 1

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                heard.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                heard.may_answer.wait(10)
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    yield heard
    heard.may_answer.set()
    heard.server.shutdown()
    heard.server.server_close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(tmp_path))))
    yield ledger
    ledger.close()


class Mirrored:
    """A replica's `Shadowing`, and requests to it."""

    def __init__(self, ledger: Ledger, address: str, *, version: int = 1) -> None:
        self.counts: Counter[str] = Counter()
        self.address = address
        self.troubles: dict[str, BaseException] = {}
        """What fails next, once, and how."""
        self.shadowing = Shadowing(
            model=MODEL,
            version=version,
            ledger=ledger,
            fetch_targets=self.fetch_targets,
            token=self.token,
            proof=PROOF,
            count=self.count,
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
        if (trouble := self.troubles.pop(what, None)) is not None:
            raise trouble

    def ask(self, number: int = 0, **more: str) -> bool:
        """Whether a copy was made; more is what the edge said."""
        return self.send(EdgeHeaders(request_id=f"r{number}", **more), b'{"entities": [{"id": 1}]}')

    def send(self, edge: EdgeHeaders, body: bytes) -> bool:
        answer = self.shadowing.add_copy(Response(), Operation.predict, edge, body)
        if answer.background is None:
            return False
        asyncio.run(answer.background())
        return True


@pytest.fixture
def mirrored(ledger: Ledger, heard: Heard) -> Iterator[Mirrored]:
    mirrored = Mirrored(ledger, heard.address)
    yield mirrored
    mirrored.shadowing.close()


def test_a_shadow_starts_changes_and_stops_with_the_ledger(
    mirrored: Mirrored, heard: Heard, ledger: Ledger
) -> None:
    """Without a restart, and no other model's or the shadow's own requests go anywhere."""
    assert not mirrored.ask()
    ledger.append(ShadowStarted(model="other", version=1, app="other-v1", share=100.0), actor="t")
    ledger.append(STARTED, actor="t")
    wait_until(mirrored.ask)
    wait_until(lambda: len(heard.requests) == 1)
    assert not mirrored.ask(arm="shadow")
    itself = Mirrored(ledger, heard.address, version=2)
    wait_until(lambda: itself.shadowing._seq == ledger.head())
    assert not itself.ask()
    itself.shadowing.close()
    ledger.append(STOPPED, actor="t")
    wait_until(lambda: not mirrored.ask())


def test_a_copy_carries_nothing_of_the_client_but_the_question(
    mirrored: Mirrored, heard: Heard, ledger: Ledger
) -> None:
    """It comes as the service itself, asks as of the moment of the answer, and is told to log as the shadow."""
    ledger.append(STARTED, actor="t")
    wait_until(lambda: mirrored.ask(7, unit_hash="u", arm="control", variant="champion"))
    wait_until(lambda: len(heard.requests) == 1)
    [(path, headers, body)] = heard.requests
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


def test_a_shadow_that_hangs_costs_nothing_but_its_copies(
    mirrored: Mirrored, heard: Heard, ledger: Ledger
) -> None:
    """So many wait, all others are dropped and counted; those that waited are sent in the end."""
    heard.may_answer.clear()
    ledger.append(STARTED, actor="t")
    wait_until(mirrored.ask)
    while len(heard.requests) < SENDERS:  # each sender hangs with one
        mirrored.ask()
    before = mirrored.counts["dropped"]
    asked = 2 * MAX_WAITING
    assert all(mirrored.ask(number) for number in range(asked))
    assert mirrored.counts["dropped"] - before >= asked - MAX_WAITING
    heard.may_answer.set()
    wait_until(lambda: mirrored.counts["sent"] == SENDERS + MAX_WAITING)


def test_a_shadow_that_is_down_or_refuses_is_counted(
    mirrored: Mirrored, heard: Heard, ledger: Ledger
) -> None:
    """And one large body is not kept."""
    heard.server.shutdown()
    heard.server.server_close()
    ledger.append(STARTED, actor="t")
    wait_until(mirrored.ask)
    wait_until(lambda: mirrored.counts["failed"] == 1)
    assert mirrored.send(EdgeHeaders(request_id="r"), bytes(MAX_COPY_BYTES + 1))
    assert mirrored.counts["dropped"] == 1


def test_a_connection_that_the_shadow_has_closed_costs_no_copy(heard: Heard) -> None:
    """Serve closes one after 90 s without a request, so a model that is seldom asked would have no copies at all."""
    heard.idle_s = 0.05
    with contextlib.closing(Connections()) as connections:
        for number in range(1, 4):
            assert connections.post(heard.address, "/", b"", {}) == 200
            wait_until(lambda number=number: heard.num_closed == number)  # type: ignore[misc]
    assert len(heard.requests) == 3


def test_a_connection_is_kept_while_its_replica_is_there(heard: Heard) -> None:
    """And closed when it is gone, or replicas that come and go would leave one each."""
    with contextlib.closing(Connections()) as connections:
        for _ in range(3):
            assert connections.post(heard.address, "/", b"", {}) == 200
        connections.close_others([heard.address])
        assert heard.num_closed == 0
        connections.close_others(["127.0.0.1:1"])
        wait_until(lambda: heard.num_closed == 1)


def test_copies_follow_a_shadow_whose_replica_is_replaced(
    heard: Heard, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not only when it is time to ask Serve."""
    monkeypatch.setattr(shadow_replicas, "INTERVAL_S", 600.0)
    mirrored = Mirrored(ledger, f"127.0.0.1:{free_port()}")
    ledger.append(STARTED, actor="t")
    wait_until(lambda: mirrored.ask() and mirrored.counts["failed"] > 0)
    mirrored.address = heard.address
    wait_until(lambda: mirrored.ask() and mirrored.counts["sent"] > 0)
    mirrored.shadowing.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("what", "trouble"),
    [("fetch_targets", AttributeError("a")), ("token", RuntimeError("t")), ("count", SystemExit())],
    ids=["asking Serve", "sending", "a thread that ends"],
)
def test_nothing_ends_copies_for_good(
    mirrored: Mirrored, ledger: Ledger, what: str, trouble: BaseException
) -> None:
    """What nobody had thought of costs one copy or one look."""
    ledger.append(STARTED, actor="t")
    for _ in range(SENDERS):
        mirrored.troubles[what] = trouble
        wait_until(lambda: mirrored.ask() and what not in mirrored.troubles)
    before = mirrored.counts["sent"]
    wait_until(lambda: mirrored.ask() and mirrored.counts["sent"] > before + SENDERS)


def test_serve_is_asked_seldom_and_sooner_only_while_that_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replica does so, and a shadow that is down for an hour must not have all of them ask every second."""
    monkeypatch.setattr(shadow_replicas, "INTERVAL_S", 10.0)
    monkeypatch.setattr(shadow_replicas, "FIRST_S", 1.0)
    now = 0.0
    pace = FetchSchedule(lambda: now)

    def asked(failing: bool, seconds: int) -> list[float]:
        nonlocal now
        found, end = [], now + seconds
        while now < end:
            if pace.is_due(failing=failing):
                found.append(now)
            now += 0.5
        return found

    assert asked(False, 30) == [0, 10, 20]
    assert asked(True, 40) == [30, 32, 36, 44, 54, 64]
    assert asked(False, 20) == [74, 84]


@contextlib.contextmanager
def running_pair(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    """Version 1 of a model, and version 2 as its shadow."""
    targets: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(parts_module, "serve_targets", lambda record: lambda: targets)
    config = PlatformConfig(storage=StorageConfig(root=str(root)))
    with running_replica(root, SIGNATURE) as replica:
        ledger = open_ledger(config)
        write_model(root / "second", SIGNATURE)
        Registry(ledger, replica.places).register(
            root / "second",
            name=MODEL,
            family="sum",
            task=SIGNATURE.task.value,
            lineage=Lineage(training_set_hash=""),
            metrics={},
            store=key_store(replica.keys),
            actor="t",
        )
        second = Predictor(to_plain(config), MODEL, 2)
        with served(application(second, f"/{APP}", replica.failures)) as address:
            targets[APP] = (address,)
            ledger.append(STARTED, actor="t")
            yield replica
        ledger.close()


def test_a_shadows_predictions_lie_beside_the_answers_and_are_in_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both endpoints, with binary tensors too: joined by the request id, and left out of what was served."""
    with running_pair(tmp_path, monkeypatch) as replica:
        log, store = Path(replica.places.predictions(MODEL)), key_store(replica.keys)
        raw = to_raw("FP64", [3.0])
        tensor = {"name": "age", "datatype": "FP64", "shape": [1]}
        head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
        asked = 0

        def ask() -> bool:
            nonlocal asked
            by_key = {"entities": [{"id": 1}], "features": {"age": 3}}
            ids = [replica.as_edge(request_id=f"r{asked + n}", arm="outside") for n in range(2)]
            assert replica.json("/v1/models/m:predict", by_key, headers=ids[0])[0] == 200
            length = {"Inference-Header-Content-Length": str(len(head))}
            assert (
                replica.call("/v2/models/m/versions/1/infer", head + raw, headers=ids[1] | length)[0] == 200
            )
            asked += 2
            return read_shadow_predictions(log, store).height >= 4

        wait_until(ask)
        shadows = read_shadow_predictions(log, store)
        answers = replica.log()
        assert set(shadows.select("version", "variant", "arm").rows()) == {(2, "shadow", "shadow")}
        assert set(answers["version"]) == {1}
        assert answers.height == asked
        pairs = shadows.join(answers, on="request_id", suffix="_answered")
        assert pairs.height == shadows.height
        assert pairs["value"].to_list() == pairs["value_answered"].to_list()
        assert pairs["age"].to_list() == pairs["age_answered"].to_list()
    assert replica.failures == []
