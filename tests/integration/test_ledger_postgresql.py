"""Tests of the ledger on a real PostgreSQL server that the tests start and stop."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.chain import verify_chain
from cluster.ledger.events import ClusterStopped
from cluster.registry import Registry
from cluster.security.tls.certificates import ensure_tls
from cluster.storage import Layout
from tests.servers.postgresql import running_server


@pytest.fixture
def url() -> Iterator[str]:
    with running_server() as address:
        yield address


def _append_many(url: str, writer: int) -> None:
    ledger = Ledger(url)
    for number in range(25):
        ledger.append(ClusterStopped(cluster_id=f"{writer}-{number}"), actor="user:a")


def test_concurrent_writers_on_postgresql_never_fork(url: str, tmp_path: Path) -> None:
    """Four processes append 25 events each and make one chain of 100 events.

    The registry works in the same database.
    """
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
    """The ledger verifies the server's certificate with our CA.

    It does not connect to a server without TLS, or to one with another CA's certificate.
    """
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
