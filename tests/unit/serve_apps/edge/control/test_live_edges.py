"""Several edges with one ledger on PostgreSQL: commands wait for all, and all together keep the limits."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import RolloutWeightChanged
from cluster.settings import PlatformConfig
from serve_apps.edge.control import waiting
from serve_apps.edge.control.edge_state import EdgeState
from serve_apps.edge.control.live_edges import EdgeReporter, edge_id, ensure_table, read_edges
from serve_apps.edge.control.waiting import EdgeTimeout, wait_until_applied
from serve_apps.edge.haproxy.request_limits import Limited
from tests.samples.rollouts import DEPLOYED, ROLLED_BACK, STARTED
from tests.servers.controller import CHAMPION_ONLY, ONE, Running, new_controller
from tests.servers.polling import wait_until
from tests.servers.postgresql import end_connections, new_database

CONFIG = PlatformConfig()
STATE = EdgeState(applied_seq=0, backends=["m-v1"], pid=1)


@pytest.fixture
def ledger(server: str) -> Iterator[Ledger]:
    opened = Ledger(new_database(server, secrets.token_hex(4)))
    yield opened
    opened.close()


@pytest.fixture
def edges(ledger: Ledger, tmp_path: Path) -> Iterator[tuple[Running, Running]]:
    """Two running edges of a model with a rollout."""
    for event in (*DEPLOYED, STARTED):
        ledger.append(event, actor="test")
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(new_controller(tmp_path / name, ledger=Ledger(str(ledger.engine.url))))
            for name in ("one", "two")
        )
        for edge in (one, two):
            edge.thread.start()
        wait_until(lambda: len(live(ledger)) == 2)
        wait_until_applied(CONFIG, ledger, ledger.head(), app="m-v1")
        yield one, two


def live(ledger: Ledger) -> list[str]:
    """Return the addresses of the live edges."""
    ensure_table(ledger)
    with ledger.engine.connect() as connection:
        return [edge.address for edge in read_edges(connection) if edge.is_live]


def default_limit(edge: Running) -> str:
    """Return the default limits of a principal in the running HAProxy."""
    shown = edge.ask(f"show map {edge.settings.limits.file(Limited.principal)}")
    return next((line.split()[2] for line in shown.splitlines() if " * " in line), "")


@pytest.fixture
def reporter(ledger: Ledger, tmp_path: Path) -> Callable[[str], EdgeReporter]:
    """Returns the reporter of an edge with a name."""
    return lambda name: EdgeReporter(
        ledger, edge=name, address=f"https://{name}", count_file=tmp_path / f"{name}.count"
    )


def test_command_ends_when_every_edge_has_applied_its_change(
    ledger: Ledger, edges: tuple[Running, Running]
) -> None:
    """After each of 20 weight changes, both edges have the new split at once."""
    for number in range(20):
        weight = 10 + number
        event = RolloutWeightChanged(model="m", rollout="r", weight=weight)
        wait_until_applied(CONFIG, ledger, ledger.append(event, actor="test").seq)
        expected = f"m-v1|m-v2|challenger|r|s|{weight * 100}|{10_000 - weight * 100}"
        assert [edge.split() for edge in edges] == [expected, expected]


def test_command_names_the_edge_that_cannot_apply_its_change(
    ledger: Ledger, edges: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other edge has the change. The command ends once the fault is gone."""
    monkeypatch.setattr(waiting, "DEADLINE_S", 2.0)
    good, bad = edges
    file = Path(bad.settings.map_file)
    file.unlink()
    file.mkdir()
    seq = ledger.append(ROLLED_BACK, actor="test").seq
    with pytest.raises(EdgeTimeout, match=f"event {seq}.*https://{bad.settings.bind}\\.") as refused:
        wait_until_applied(CONFIG, ledger, seq)
    assert good.settings.bind not in str(refused.value)
    assert good.split() == CHAMPION_ONLY
    file.rmdir()
    wait_until_applied(CONFIG, ledger, seq)


def test_command_waits_until_every_edge_has_the_application(
    ledger: Ledger, edges: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that one edge does not reach yet gets no traffic there."""
    monkeypatch.setattr(waiting, "DEADLINE_S", 1.0)
    one, two = edges
    one.add_app("m-v3")
    with pytest.raises(EdgeTimeout, match=two.settings.bind):
        wait_until_applied(CONFIG, ledger, ledger.head(), app="m-v3")
    two.serve.targets = {**two.serve.targets, "m-v3": (ONE,)}
    monkeypatch.undo()
    wait_until_applied(CONFIG, ledger, ledger.head(), app="m-v3")


def test_edges_share_the_limits(ledger: Ledger, edges: tuple[Running, Running]) -> None:
    """Each allows half. When one stops, the other allows all, and no command waits for the stopped one."""
    for edge in edges:
        wait_until(lambda edge=edge: default_limit(edge) == "5000|192")  # type: ignore[misc]
    one, two = edges
    two.stop()
    assert live(ledger) == [f"https://{one.settings.bind}"]
    wait_until(lambda: default_limit(one) == "10000|384")


def test_edge_keeps_its_place_when_its_controller_is_replaced(
    ledger: Ledger, edges: tuple[Running, Running]
) -> None:
    """A restart is no new edge, and commands wait for it."""
    one, _ = edges
    one.hand_over()
    assert len(live(ledger)) == 2
    one.begin()
    one.thread.start()
    wait_until_applied(CONFIG, ledger, ledger.append(ROLLED_BACK, actor="test").seq)
    assert one.split() == CHAMPION_ONLY
    assert len(live(ledger)) == 2


def test_silent_edge_is_not_waited_for_but_named(
    ledger: Ledger,
    reporter: Callable[[str], EdgeReporter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may still serve an earlier state, if only its network to the database is cut."""
    killed, running = reporter("killed"), reporter("running")
    killed.report(STATE)
    wait_until(lambda: live(ledger) == ["https://killed"])
    killed.stop(remove=False)
    with ledger.writing() as connection:
        connection.exec_driver_sql("UPDATE edges SET reported_at = now() - interval '7 s'")
    monkeypatch.setattr(waiting, "DEADLINE_S", 0.2)
    with pytest.raises(EdgeTimeout, match="No edge has reported within 5 s"):
        wait_until_applied(CONFIG, ledger, 1)
    running.report(EdgeState(applied_seq=1, backends=[], pid=1))
    wait_until(lambda: live(ledger) == ["https://running"])
    wait_until_applied(CONFIG, ledger, 1)
    running.stop(remove=True)
    warning = capsys.readouterr().err
    assert re.search(r"warning: edge https://killed has not reported for \d+ s\.", warning)


def test_report_survives_a_broken_connection(ledger: Ledger, reporter: Callable[[str], EdgeReporter]) -> None:
    """The next report uses a new connection, and the number of live edges is right again."""
    one, two = reporter("one"), reporter("two")
    for each in (one, two):
        each.report(STATE)
    wait_until(lambda: (one.num_edges, two.num_edges) == (2, 2))
    end_connections(ledger.engine)
    one.report(EdgeState(applied_seq=5, backends=["m-v1", "m-v2"], pid=1))
    with ledger.engine.connect() as connection:
        wait_until(lambda: any(edge.applied_seq == 5 for edge in read_edges(connection, app="m-v2")))
    for each in (one, two):
        each.stop(remove=True)
    assert live(ledger) == []


def test_count_of_edges_falls_only_after_uninterrupted_reports(
    ledger: Ledger, reporter: Callable[[str], EdgeReporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage, and after a restart, the others need some time until they have reported again."""
    now = 100.0
    monkeypatch.setattr("serve_apps.edge.control.live_edges.time.monotonic", lambda: now)
    one = reporter("one")
    one._update_count(3)
    again = reporter("one")
    assert again.num_edges == 3
    counts = []
    for now, count in ((100.0, 1), (104.0, 1), (106.0, 2), (113.0, 1), (117.0, 1), (119.0, 1)):  # noqa: B007
        again._update_count(count)
        counts.append(again.num_edges)
    assert counts == [3, 3, 2, 2, 2, 1]


def test_reporter_survives_any_error(
    ledger: Ledger, reporter: Callable[[str], EdgeReporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise commands would never wait for the edge again."""
    one = reporter("one")
    with monkeypatch.context() as patch:

        def failing(*_: object) -> None:
            raise KeyError("a mistake")

        patch.setattr(one, "_write", failing)
        one.report(STATE)
        one.wait_for_first(10)
    wait_until(lambda: live(ledger) == ["https://one"])
    one.stop(remove=True)


def test_report_changes_no_setting_of_the_connection(
    ledger: Ledger, reporter: Callable[[str], EdgeReporter]
) -> None:
    """A pooler gives the connection to other users, and an append to the ledger must reach the disk."""
    one = reporter("one")
    one._write(STATE)
    assert one._connection is not None
    assert one._connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
    one._close()


def test_edge_has_one_id(tmp_path: Path) -> None:
    """Also if the file was written half."""
    first = edge_id(tmp_path)
    assert edge_id(tmp_path) == first
    (tmp_path / "edge.id").write_text("")
    assert edge_id(tmp_path) != first
