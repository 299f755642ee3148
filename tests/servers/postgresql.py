"""A PostgreSQL server for tests."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from tests.servers.ports import free_port


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def is_installed() -> bool:
    """Return whether this machine has PostgreSQL."""
    return _binary("initdb") is not None and _binary("postgres") is not None


def _as_postgres(*command: str) -> list[str]:
    """Return a command that runs as the user `postgres` if this process is root.

    PostgreSQL refuses to run as root.
    """
    runuser = shutil.which("runuser", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "runuser"
    return [runuser, "-u", "postgres", "--", *command] if os.geteuid() == 0 else list(command)


@dataclass(kw_only=True)
class Server:
    """A PostgreSQL server that can be killed and started again with its data."""

    command: list[str]
    folder: Path
    address: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait(self.address)

    def kill(self) -> None:
        """Kill all processes of the server, as `kill -9` does."""
        members = psutil.Process(self.process.pid).children(recursive=True)
        for member in (*members, self.process):
            member.kill()
        psutil.wait_procs(members)
        self.process.wait()

    def stop(self) -> None:
        """End the server at once, also if it has clients. It removes its shared memory."""
        if self.process.poll() is None:
            pid = (self.folder / "data" / "postmaster.pid").read_text().split()[0]  # not that of `runuser`
            os.kill(int(pid), signal.SIGQUIT)
            self.process.wait()


@contextmanager
def running_server(
    *settings: str, certificates: Path | None = None, subnet: str | None = None
) -> Iterator[str]:
    """Start a new server and yield its address; see `server`."""
    with server(*settings, certificates=certificates, subnet=subnet) as started:
        yield started.address


@contextmanager
def server(*settings: str, certificates: Path | None = None, subnet: str | None = None) -> Iterator[Server]:
    """Start a new server and yield it. If PostgreSQL is not installed, skip the test.

    If `certificates` is a folder with a node's certificate and key, the server uses TLS. With a subnet, it also listens
    on all addresses and accepts clients of the subnet.
    """
    initdb, program = _binary("initdb"), _binary("postgres")
    if initdb is None or program is None:
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
    if subnet is not None:
        with (folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {subnet} trust\n")
        settings = (*settings, "listen_addresses=*")
    options = [option for setting in ("listen_addresses=127.0.0.1", *settings) for option in ("-c", setting)]
    started = Server(
        command=_as_postgres(program, "-D", data, "-p", str(port), "-k", str(folder), *options),
        folder=folder,
        address=f"postgresql+psycopg://falaj@127.0.0.1:{port}/postgres",
    )
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder)


def new_database(address: str, name: str) -> str:
    """Create an empty database on a server and return its address."""
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    engine.dispose()
    return address.replace("/postgres", f"/{name}")


def end_connections(engine: sa.Engine) -> None:
    """End all connections to an engine's database but the one that does it, as a restart of the server would."""
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"{others} AND datname = current_database()")


def _wait(address: str) -> None:
    engine = sa.create_engine(address, connect_args={"connect_timeout": 2})
    for _ in range(200):
        try:
            engine.connect().close()
            return
        except sa.exc.OperationalError:
            multiprocessing.Event().wait(0.1)
    raise TimeoutError("PostgreSQL did not answer within 20 s.")
