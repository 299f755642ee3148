"""Files of access records rotate while requests are answered, and no record is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.ledger import Ledger
from cluster.security.edge_proof import edge_proof
from serve_apps.edge.control import haproxy_process
from serve_apps.edge.control.haproxy_process import HAProxy
from serve_apps.edge.haproxy.dashboard import TOKEN_VARIABLE
from serve_apps.replica.edge_headers import edge_variables
from serve_apps.rollout.evidence.access_files import Rotation, is_complete, list_files
from serve_apps.rollout.evidence.collecting import Reader
from tests.servers.controller import Running, running_controller
from tests.servers.edge import ROLLOUT, Edge, running_edge
from tests.servers.polling import wait_until
from tests.servers.small_disk import fill_disk, mounted_small_disk


def access_files(edge: Edge) -> list[Path]:
    return list_files(Path(edge.places.root) / "access")


def records_of(path: Path) -> list[str]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


def test_no_request_and_no_record_is_lost_while_files_rotate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come over one connection that stays open, and over new ones. Each has exactly one record."""
    monkeypatch.setattr(haproxy_process, "ROTATION_RETRY_S", 0.0)
    answered: list[str] = []
    ended = threading.Event()
    with running_edge(tmp_path) as edge:
        token = edge.token()

        def ask(*, keep: bool) -> None:
            with contextlib.closing(edge.connect()) as connection:
                while not ended.is_set():
                    status, echo = edge.call(token=token, over=connection if keep else None)
                    assert status == 200
                    answered.append(echo["x-falaj-request-id"])

        threads = [threading.Thread(target=ask, kwargs={"keep": keep}) for keep in (True, False)]
        for thread in threads:
            thread.start()
        for number in range(3):
            wait_until(lambda: access_files(edge)[-1].stat().st_size > 0)
            edge.haproxy.rotation = Rotation(max_bytes=1)
            assert edge.haproxy.is_rotation_due
            edge.load(ROLLOUT)
            assert len(access_files(edge)) >= number + 2
        edge.haproxy.rotation = Rotation()
        before = len(answered)
        wait_until(lambda: len(answered) > before + 20)
        ended.set()
        for thread in threads:
            thread.join()
        files = access_files(edge)
        wait_until(lambda: all(is_complete(path) for path in files[:-1]), seconds=30)
        assert not is_complete(files[-1])
        ids = [request_id for path in files for request_id in records_of(path)]
    assert sorted(ids) == sorted(answered)


def test_file_of_a_killed_haproxy_is_complete(tmp_path: Path) -> None:
    """Master and worker are killed with kill -9; the file's lock ends with them."""
    with running_edge(tmp_path) as edge:
        assert edge.call(token=edge.token())[0] == 200
        wait_until(lambda: bool(edge.records()))
        [file] = access_files(edge)
        assert not is_complete(file)
        master = psutil.Process(edge.haproxy.pid or 0)
        for process in (master, *master.children()):
            os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: is_complete(file))
        assert len(records_of(file)) == 1


def test_full_disk_costs_records_but_no_request(tmp_path: Path) -> None:
    """The edge answers, and later records are whole. The reader counts a cut one as broken."""
    with mounted_small_disk(tmp_path / "disk", size_mib=2) as disk, running_edge(tmp_path / "edge") as edge:
        edge.haproxy.stop()
        edge.haproxy = HAProxy(
            config=tmp_path / "edge" / "haproxy.cfg",
            admin_socket=Path(edge.settings.admin_socket),
            access_folder=disk,
            secrets={TOKEN_VARIABLE: "", **edge_variables(edge_proof(edge.places))},
        )
        edge.load(ROLLOUT)
        ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
        reader = Reader(ledger.engine, disk, edge="one", rotation=Rotation())
        token = edge.token()
        assert edge.call(token=token)[0] == 200
        [file] = list_files(disk)
        wait_until(lambda: file.stat().st_size > 0)
        fill_disk(disk / "rest")
        assert [edge.call(token=token)[0] for _ in range(30)] == [200] * 30
        (disk / "rest").unlink()
        after = [edge.call(token=token)[1]["x-falaj-request-id"] for _ in range(3)]
        wait_until(lambda: after[-1] in file.read_text())
        collected = reader.collect()
        ledger.close()
    assert collected.broken <= 1
    assert 3 <= collected.records <= 33


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(haproxy_process, "ROTATION_RETRY_S", 0.0)
    with running_controller(tmp_path) as running:
        yield running


def test_controller_rotates_a_file_that_is_due(controller: Running) -> None:
    """An old file without records stays."""
    folder = controller.haproxy_file.with_name("access")
    controller.haproxy.rotation = Rotation(max_age_s=0.0)
    controller.wait_for_targets(2)
    assert len(list_files(folder)) == 1
    list_files(folder)[0].write_text("{}\n")
    wait_until(lambda: len(list_files(folder)) == 2, seconds=20)
    assert controller.split() != ""
