"""What every application's constructor does to the process of its replica."""

from __future__ import annotations

from cluster.node.scheduling import interrupt_others
from serve_apps.replica.direct import Application, answer_directly
from serve_apps.replica.listening import listen_on_own_address
from serve_apps.replica.one_write import answer_in_one_write
from serve_apps.replica.parsing import parse_heads_only


def prepare_replica(answer: Application, *, at_once: int) -> None:
    """Have requests answered by the application, the shortest way; to be called by its constructor.

    Args:
        answer: the application.
        at_once: so many requests at most; the others wait.
    """
    listen_on_own_address()
    answer_in_one_write()
    parse_heads_only()
    interrupt_others()
    answer_directly(answer, at_once=at_once)
