"""A HAProxy beside masters of earlier controllers that are just ending, or do not answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve_apps.edge.control import haproxy_process as haproxy
from tests.servers.edge import ROLLOUT, Edge


@contextlib.contextmanager
def earlier_master(edge: Edge, does: Callable[[socket.socket], object]) -> Iterator[None]:
    """A master's socket whose owner does something to each connection; its name sorts before ours."""
    path = Path(edge.settings.admin_socket).with_name(f"{haproxy.MASTER_PREFIX}0.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    does(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    path.unlink(missing_ok=True)


def test_master_that_ends_during_a_command_is_ignored(edge: Edge) -> None:
    """This is also true when HAProxy starts."""
    with earlier_master(edge, socket.socket.close):
        edge.haproxy.stop()
        edge.load(ROLLOUT)
    assert edge.call("/v2/health/live", method="GET")[0] == 200


def test_silent_master_does_not_block_the_serving_worker(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker gets the change, and the caller gets an error."""
    monkeypatch.setattr(haproxy, "SOCKET_TIMEOUT_S", 0.2)
    file, open_connections = Path(edge.settings.map_file), []
    with earlier_master(edge, open_connections.append):
        with pytest.raises(TimeoutError):
            edge.haproxy.set_map(file, "other", "split")
        assert "other split" in edge.ask(f"show map {file}")
        with pytest.raises(TimeoutError):
            edge.haproxy.del_map(file, "other")
        assert "other" not in edge.ask(f"show map {file}")


def test_configuration_of_an_earlier_cluster_is_not_started(edge: Edge) -> None:
    """Its sockets are in a folder that is gone. The edge waits for the ledger and does not end."""
    edge.load(ROLLOUT)
    edge.haproxy.stop()
    config = Path(edge.places.root) / "haproxy.cfg"
    own = config.read_text()
    config.write_text(own.replace(str(Path(edge.settings.admin_socket).parent), "/tmp/falaj-gone"))
    assert not edge.haproxy.serve_last()
    config.write_text(own)
    assert edge.haproxy.serve_last()
    assert edge.call("/v2/health/live", method="GET")[0] == 200
