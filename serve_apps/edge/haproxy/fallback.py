"""Let the champion answer when a treatment's replicas do not: when they are dead, when they hang, and in between.

Each version has two backends. The plain backend is patient: a busy replica must stay in, because there may be no other
one. The backend of treated requests is strict, because the champion stands behind its replicas, as a backup server that
leads back into this HAProxy. There, one refused connection or one unanswered health check takes a replica out. Requests
in a killed replica are sent at once to the next replica or to the champion. Requests in a hanging replica are sent on
after ten times the hang limit. (HAProxy could end these at once, too. But then it sometimes ends a request of a killed
replica while that request is being sent again.) Such requests keep their arm, and their access record has `fallback`.

The champion keeps its own timeout although it is called through the strict backend. Otherwise it would get a second
copy of a request that it is still working on. So a request that finds no replica is sent once, and waits as long as
elsewhere. While a champion is scaled to zero, all treated requests wait that long, including those in a hanging
replica.
"""

from __future__ import annotations

from serve_apps.edge.haproxy import connections
from serve_apps.edge.haproxy.answers import NO_HEALTHY_REPLICA, refuse
from serve_apps.edge.haproxy.backends import HEALTH_CHECK, acl_any_up, server_lines
from serve_apps.edge.haproxy.routes import Backend
from serve_apps.replica.edge_headers import VARIANT
from serve_apps.rollout.assignment import CHAMPION_VARIANT

SUFFIX = ":treated"
_BACKUP_SERVER = CHAMPION_VARIANT
_CONNECT_MS = 500
"""A retry of a refused connection waits at most this long."""
_CHECK_EVERY_MS = 200
_ANSWER_TIMEOUT_IN_HANGS = 10
"""Timeout of an answer, as a multiple of the hang limit."""


def frontend(*, map_file: str, socket: str) -> str:
    """Return the frontend where a treated request comes in again, for the champion.

    The request's path still begins with the treatment's application.
    """
    return f"""frontend again
    bind unix@{socket} mode 600
    http-request set-var(txn.model) path,field(5,/),field(1,:)
    http-request set-var(txn.backend) var(txn.model),map_str({map_file}),field(1,|)
    {refuse(503, NO_HEALTHY_REPLICA)} unless {{ var(txn.backend),nbsrv -m int gt 0 }}
{connections.wait_for_body()}
    http-request set-header {VARIANT} {CHAMPION_VARIANT}
    http-request set-var(txn.rest) path,regsub(^/[^/]+,)
    http-request set-path /%[var(txn.backend)]%[var(txn.rest)]
    use_backend %[var(txn.backend)]
"""


def record_fallback() -> str:
    """Return a frontend's rules that put a champion's answer by fallback into the access record."""
    by_champion = f"if {{ srv_name -m str {_BACKUP_SERVER} }}"
    return f"""    http-response set-var(txn.fallback) bool(true) {by_champion}
    http-response set-var(txn.variant) str({CHAMPION_VARIANT}) {by_champion}"""


def treated_backend(
    backend: Backend, *, socket: str, hang_ms: int, champion_ms: int, champion_scaled_to_zero: bool
) -> str:
    """Return the backend of treated requests.

    Args:
        backend: the treatment's application.
        socket: address of the frontend above.
        hang_ms: how long a replica may leave a health check unanswered.
        champion_ms: timeout of the champion's answer.
        champion_scaled_to_zero: whether a champion has to be started first.
    """
    name = f"{backend.name}{SUFFIX}"
    answer_ms = champion_ms if champion_scaled_to_zero else hang_ms * _ANSWER_TIMEOUT_IN_HANGS
    retried = "conn-failure empty-response" + ("" if champion_scaled_to_zero else " response-timeout")
    some_up = "\n".join(acl_any_up("some_up", name, backend.servers))
    servers = "\n".join(server_lines(backend.servers))
    every = f"inter {_CHECK_EVERY_MS}ms fastinter {_CHECK_EVERY_MS // 2}ms downinter {_CHECK_EVERY_MS}ms"
    on_error = "observe layer4 error-limit 1 on-error mark-down"
    return f"""backend {name}
    balance leastconn
    timeout connect {_CONNECT_MS}ms
    timeout server {answer_ms}ms
    retry-on {retried}
{some_up}
    http-request set-timeout server {champion_ms}ms unless some_up
    http-request disable-l7-retry unless some_up
    timeout check {hang_ms}ms
{HEALTH_CHECK}
    default-server {every} fall 1 rise 1 {on_error}
{servers}
    server {_BACKUP_SERVER} unix@{socket} backup
"""
