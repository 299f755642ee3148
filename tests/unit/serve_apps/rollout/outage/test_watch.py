"""While the ledger does not answer, harm still rolls back, and nothing else acts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import RollbackJournaled, RolloutRolledBack
from cluster.metrics import new_registry
from cluster.statistics.evidence import Evidence
from serve_apps.rollout.controller import looking
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.looks import Counts
from serve_apps.rollout.outage import local_evidence, watch
from serve_apps.rollout.outage.journal import Journal
from serve_apps.rollout.outage.known import KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.watch import OutageWatch
from tests.samples.access_records import line
from tests.samples.journaled import ROLLBACK, new_journal
from tests.samples.policies import EARLY, FAILING, HEALTHY, EvidenceDouble, permitted, started_ledger
from tests.servers.polling import wait_until
from tests.servers.postgresql import server

FILE = "20261130T000000-000000001-a.jsonl"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "EVERY_S", 0.05)
    monkeypatch.setattr(watch, "EVERY_S", 0.05)
    monkeypatch.setattr(watch, "OUTAGE_S", 0.5)


@dataclass
class Machine:
    """The folder of one machine, with its edge's access files."""

    folder: Path

    @property
    def journal(self) -> Journal:
        return new_journal(self.folder)

    def new_watch(self) -> OutageWatch:
        """Return the watch of a process that starts now."""
        access = self.folder / "access"
        access.mkdir(exist_ok=True)
        return OutageWatch(self.journal, KnownRollouts(self.folder / "rollouts.known"), LocalEvidence(access))

    def record(self, *, failing: int, champion: int = 20, file: str = FILE) -> None:
        """Write access records: requests of the champion, and failing ones of the treatment at the same time."""
        lines = [line(rollout="r", arm="control", ended_ms=1001) for _ in range(champion)]
        lines += [
            line(rollout="r", ended_ms=1000 + number, status=500, unit_hash=str(number).zfill(16))
            for number in range(failing)
        ]
        with (self.folder / "access" / file).open("ab") as records:
            records.write(b"".join(lines))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def down(watching: OutageWatch) -> OutageWatch:
    """Return the watch when no look has ended for a long time."""
    watching._answered_at -= 60
    return watching


def known(machine: Machine) -> OutageWatch:
    """Return a watch that knows the rollout, while the ledger is down."""
    watching = machine.new_watch()
    watching.begin_look(started_ledger("sqlite://"), actor="a")
    watching.end_look()
    return down(watching)


@contextmanager
def looking_at(ledger: Ledger, watching: OutageWatch, counts: Evidence, file: Path) -> Iterator[None]:
    """Run the loop of a controller, and the watch."""
    stopped, metrics = threading.Event(), ControllerMetrics(new_registry())
    controller = Controller(ledger, EvidenceDouble(counts), refusal=permitted)
    arguments = (controller, Leadership(ledger.engine, file), metrics, stopped, watching)
    threads = [
        threading.Thread(target=looking.look_until_stopped, args=arguments),
        threading.Thread(target=watching.run, args=(stopped, metrics.journaled.set)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def test_locked_sqlite_does_not_hold_up_a_rollback(machine: Machine) -> None:
    """The counts are in a file of their own. When the lock is released, the ledger has one rollback."""
    ledger = started_ledger(f"sqlite:///{machine.folder}/ledger.db")
    watching = machine.new_watch()
    watching.begin_look(ledger, actor="a")
    watching.end_look()
    watching.use(EvidenceDouble(FAILING))
    lock = machine.folder / "lock"
    with ExitStack() as held, looking_at(ledger, watching, FAILING, lock):
        held.enter_context(ledger.writing())
        wait_until(lambda: bool(machine.journal.read()))
        assert ledger.last(RolloutRolledBack) is None
        held.close()
        wait_until(lambda: not machine.journal.read())
    assert len(list(ledger.entries(RolloutRolledBack))) == 1
    assert len(list(ledger.entries(RollbackJournaled))) == 1


def test_breaker_works_while_postgresql_is_down(machine: Machine) -> None:
    """The counts are in the same database, so the machine's own access records must do."""
    with server() as database:
        ledger, watching = started_ledger(database.address), machine.new_watch()
        with looking_at(ledger, watching, HEALTHY, machine.folder / "unused"):
            machine.record(failing=0)
            wait_until(lambda: bool(KnownRollouts(machine.folder / "rollouts.known").rollouts))
            database.kill()
            machine.record(failing=20)
            wait_until(lambda: bool(machine.journal.read()))
            assert machine.journal.read()[0].reasons == ["breaker: the last 20 requests, of 20 units, failed"]
            database.start()
            wait_until(lambda: not machine.journal.read(), seconds=30)
        assert ledger.last(RollbackJournaled) is not None
        ledger.close()


def test_unusable_journal_stops_no_look(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once each time that it becomes unusable. The file has wrong rights, or the disk fails."""
    ledger, watching = started_ledger("sqlite://"), machine.new_watch()
    machine.journal.reserve()
    file = machine.folder / "rollbacks.journal"
    for mode in (0o640, 0o600, 0o640):
        file.chmod(mode)
        for _ in range(2):
            watching.begin_look(ledger, actor="a")
    assert [one.run.rollout for one in watching._known.rollouts] == ["r"]
    assert caplog.text.count("without its journal") == 2

    def fail(*_: object) -> None:
        raise OSError("disk I/O error")

    file.chmod(0o600)
    watching.begin_look(ledger, actor="a")
    machine.journal.append(ROLLBACK)
    monkeypatch.setattr(Journal, "clear", fail)
    watching.begin_look(ledger, actor="a")
    assert "disk I/O error" in caplog.text
    assert ledger.last(RolloutRolledBack) is not None


def test_healthy_version_is_left_alone(machine: Machine) -> None:
    """Also at its deadline, or without data: these are no reasons of safety."""
    watching = known(machine)
    late = replace(EARLY, total_s=1e9, idle_s=1e9)
    for counts in (HEALTHY, late):
        watching.use(EvidenceDouble(counts))
        assert watching.check_once() == 0
    assert machine.journal.read() == ()


def test_nothing_is_journaled_while_the_ledger_answers(machine: Machine) -> None:
    watching = machine.new_watch()
    watching.begin_look(started_ledger("sqlite://"), actor="a")
    watching.end_look()
    watching.use(EvidenceDouble(FAILING))
    assert watching.check_once() == 0


def test_rollback_is_journaled_once(machine: Machine) -> None:
    watching = known(machine)
    watching.use(EvidenceDouble(FAILING))
    assert [watching.check_once() for _ in range(2)] == [1, 0]
    (rollback,) = machine.journal.read()
    assert (rollback.version, rollback.fallback) == (2, 1)


def test_controller_that_starts_during_the_outage_knows_the_rollouts(machine: Machine) -> None:
    """It was killed, and cannot open the ledger. A file that others can write is not used."""
    known(machine)
    machine.record(failing=20)
    assert down(machine.new_watch()).check_once() == 1
    (machine.folder / "rollbacks.journal").unlink()
    (machine.folder / "rollouts.known").chmod(0o666)
    assert down(machine.new_watch()).check_once() == 0


def test_counts_that_cannot_be_read_leave_the_access_records(machine: Machine) -> None:
    """The database of the counts can fail together with the ledger's."""

    class Failing(EvidenceDouble):
        def evidence(self, *_: object, **__: object) -> Evidence:
            raise OSError("disk I/O error")

    watching = known(machine)
    broken: Counts = Failing()
    watching.use(broken)
    machine.record(failing=20)
    assert watching.check_once() == 1


def test_last_requests_are_read_over_passes_and_files(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line is read when it is complete. Of a great backlog only the end is read."""
    watching = known(machine)
    machine.record(failing=10)
    assert watching.check_once() == 0
    with (machine.folder / "access" / FILE).open("ab") as records:
        records.write(line(rollout="r", status=500)[:50])
    assert watching.check_once() == 0
    machine.record(failing=9, file="20261130T000001-000000001-b.jsonl")
    with (machine.folder / "access" / FILE).open("ab") as records:
        records.write(line(rollout="r", status=500)[50:])
    assert watching.check_once() == 1
    monkeypatch.setattr(local_evidence, "MAX_BYTES", 4000)
    source = LocalEvidence(machine.folder / "access")
    source.read()
    assert 0 < sum(source._activities["r"].requests.values()) < 30


def test_champion_that_fails_too_is_no_reason(machine: Machine) -> None:
    """A rollback would not help."""
    watching = known(machine)
    machine.record(failing=20, champion=0)
    assert watching.check_once() == 0
