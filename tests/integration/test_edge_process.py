"""What takes a running edge some seconds: a real HAProxy over its reloads, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.edge import Edge, running_edge


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge")) as running:
        yield running


def patiently(said: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.2)


def counted(edge: Edge, subject: str) -> int:
    """How many requests of a principal the running HAProxy has let through."""
    said = edge.ask("show table principals_counted").splitlines()
    line = next((line for line in said if f"key={subject} " in line), "gpc0=0")
    return int(line.split("gpc0=")[1].split()[0])


def test_what_principals_have_asked_survives_a_reload(edge: Edge) -> None:
    """The outgoing worker teaches the new one, once it has itself been up for ten seconds or was taught."""
    patiently(lambda: int(edge.ask("show peers").split("flags=")[1].split()[0], 16) & 3 == 3)
    for number in range(1, 4):
        assert edge.call(token=edge.token(subject="gina"))[0] == 200
        edge.load_targets(edge.targets)
        patiently(lambda told=number: counted(edge, "gina") == told)  # type: ignore[misc]
