"""The ledger on a real PostgreSQL server, started and ended by the test."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.chain import verify_chain
from cluster.ledger.events import ClusterStopped
from cluster.registry import Registry
from cluster.security.tls.certificates import ensure_tls
from cluster.storage import Layout
from tests.servers.ports import free_port


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def _as_postgres(*command: str) -> list[str]:
    """PostgreSQL refuses to run as root, so there the package's own user runs it."""
    runuser = shutil.which("runuser", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "runuser"
    return [runuser, "-u", "postgres", "--", *command] if os.geteuid() == 0 else list(command)


@contextmanager
def running_server(*settings: str, certificates: Path | None = None) -> Iterator[str]:
    """A new server's address; with a folder that has a node's certificate and key, it speaks TLS."""
    initdb, server = _binary("initdb"), _binary("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql` to run this test")
    folder = Path(tempfile.mkdtemp(prefix="falaj-pg-"))
    if certificates is not None:
        for name in ("node.pem", "node.key"):
            shutil.copy(certificates / name, folder / name)
        settings = (
            *settings,
            "ssl=on",
            f"ssl_cert_file={folder}/node.pem",
            f"ssl_key_file={folder}/node.key",
        )
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
    port = free_port()
    data = str(folder / "data")
    subprocess.run(
        _as_postgres(initdb, "-D", data, "-A", "trust", "-U", "falaj"),
        check=True,
        capture_output=True,
        cwd=folder,
    )
    options = [option for setting in ("listen_addresses=127.0.0.1", *settings) for option in ("-c", setting)]
    process = subprocess.Popen(
        _as_postgres(server, "-D", data, "-p", str(port), "-k", str(folder), *options),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"postgresql+psycopg://falaj@127.0.0.1:{port}/postgres"
    try:
        _wait(address)
        yield address
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture
def url() -> Iterator[str]:
    with running_server() as address:
        yield address


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
    assert len(list(verify_chain(ledger.entries()))) == 100
    assert Registry(ledger, Layout(str(tmp_path))).names() == []
    ledger.close()


def test_the_ledger_speaks_tls_to_the_server_it_means(url: str, tmp_path: Path) -> None:
    """Verified by our authority; a server without TLS, or of another authority, is not written to."""
    for name in ("ours", "others"):
        ensure_tls(Layout(str(tmp_path / name)))
    verified = f"?sslmode=verify-full&sslrootcert={tmp_path}/ours/tls/ca.pem"
    with running_server(certificates=tmp_path / "ours" / "tls") as address:
        ledger = Ledger(address + verified)
        ledger.append(ClusterStopped(cluster_id="1"), actor="user:a")
        with ledger.writing() as connection:
            query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            assert connection.exec_driver_sql(query).scalar_one() == "TLSv1.3"
        ledger.close()
        with pytest.raises(sa.exc.OperationalError, match="certificate verify failed"):
            Ledger(address + verified.replace("/ours/", "/others/"))
    with pytest.raises(sa.exc.OperationalError, match="does not support SSL"):
        Ledger(url + verified)
