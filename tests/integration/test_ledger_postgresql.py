"""The ledger on a real PostgreSQL server, started and ended by the test."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.chain import check
from cluster.ledger.events import ClusterStopped
from cluster.registry import Registry
from cluster.storage import Layout
from tests.ports import free_port


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def _as_postgres(*command: str) -> list[str]:
    """PostgreSQL refuses to run as root, so there the package's own user runs it."""
    runuser = shutil.which("runuser", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "runuser"
    return [runuser, "-u", "postgres", "--", *command] if os.geteuid() == 0 else list(command)


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    initdb, server = _binary("initdb"), _binary("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql` to run this test")
    folder = Path("/tmp") / f"falaj-pg-{os.getpid()}"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
    port = free_port()
    data = str(folder / "data")
    subprocess.run(
        _as_postgres(initdb, "-D", data, "-A", "trust", "-U", "falaj"),
        check=True,
        capture_output=True,
        cwd=folder,
    )
    arguments = ["-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", str(folder)]
    process = subprocess.Popen(
        _as_postgres(server, *arguments), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"postgresql+psycopg://falaj@127.0.0.1:{port}/postgres"
    try:
        _wait(address)
        yield address
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def _wait(address: str) -> None:
    engine = sa.create_engine(address, connect_args={"connect_timeout": 2})
    for _ in range(200):
        try:
            engine.connect().close()
            return
        except sa.exc.OperationalError:
            multiprocessing.Event().wait(0.1)
    raise TimeoutError("PostgreSQL did not answer within 20 s.")


def _append_many(url: str, writer: int) -> None:
    ledger = Ledger(url)
    for number in range(25):
        ledger.append(ClusterStopped(cluster_id=f"{writer}-{number}"), actor="user:a")


def test_concurrent_writers_on_postgresql_never_fork(url: str, tmp_path: Path) -> None:
    """Four processes append 25 events each: one chain of 100; the registry works beside it."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(url, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ledger = Ledger(url)
    assert len(list(check(ledger.entries()))) == 100
    assert Registry(ledger, Layout(str(tmp_path))).names() == []
    ledger.close()
