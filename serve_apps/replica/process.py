"""Prepare the process of a replica. The constructor of every application calls this."""

from __future__ import annotations

from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.node.scheduling import interrupt_others
from serve_apps.replica.direct import Application, answer_directly
from serve_apps.replica.listening import listen_on_own_address
from serve_apps.replica.one_write import answer_in_one_write
from serve_apps.replica.parsing import parse_heads_only


def is_replica() -> bool:
    """Return whether this process is a replica. Tests create applications in other processes."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


def prepare_replica(answer: Application, *, max_concurrent: int) -> None:
    """Apply all changes to Serve and uvicorn in this process. The application then gets requests directly.

    Args:
        answer: the application.
        max_concurrent: largest number of requests that are handled at the same time. Other requests wait.
    """
    listen_on_own_address()
    answer_in_one_write()
    parse_heads_only()
    interrupt_others()
    answer_directly(answer, max_concurrent=max_concurrent)
