"""Let the champion answer when a treatment's replicas are dead or hang.

Each version has two backends. The plain backend has tolerant health checks: a busy replica must not be removed, because
it may be the only one. The backend of treated requests is strict, because the champion can answer instead. In this
backend, one refused connection or one unanswered health check marks a replica as down. The champion is its backup
server: a socket that leads back into this HAProxy.

If a replica is killed, its requests are sent at once to the next replica or to the champion. If a replica hangs, its
requests are sent there after ten times the hang limit. (HAProxy could end these at once, too. But then it sometimes
ends a request of a killed replica while that request is being sent again.) Requests that the champion answers stay in
the arm treatment, and their access record has `fallback`.

For the champion, the timeout is the champion's own, although it is called through the strict backend. Otherwise it
would get a second copy of a request that it has not answered yet. So if no replica is up, a request is sent only once,
with the champion's timeout. While any champion is scaled to zero, all treated requests have the timeout for starting a
replica, including those in a hanging replica.
"""

from __future__ import annotations

from serve_apps.edge.haproxy import connections
from serve_apps.edge.haproxy.answers import NO_HEALTHY_REPLICA, refuse
from serve_apps.edge.haproxy.backends import HEALTH_CHECK, acl_any_up, network_rules, server_lines
from serve_apps.edge.haproxy.routes import Backend
from serve_apps.replica.edge_headers import VARIANT
from serve_apps.replica.http_contract import TRY_ANOTHER
from serve_apps.rollout.assignment import CHAMPION_VARIANT

SUFFIX = ":treated"
_BACKUP_SERVER = CHAMPION_VARIANT
_CONNECT_MS = 500
"""After a refused connection, the next try follows within this time."""
_CHECK_EVERY_MS = 200
_ANSWER_TIMEOUT_IN_HANGS = 10
"""Timeout of an answer, divided by the hang limit."""


def frontend(*, map_file: str, socket: str) -> str:
    """Return the frontend that gets a treated request from the strict backend and sends it to the champion.

    The path of such a request begins with the name of the treatment's application.
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
    """Return a frontend's rules that record `fallback` and `variant` if the champion answers as fallback."""
    by_champion = f"if {{ srv_name -m str {_BACKUP_SERVER} }}"
    return f"""    http-response set-var(txn.fallback) bool(true) {by_champion}
    http-response set-var(txn.variant) str({CHAMPION_VARIANT}) {by_champion}"""


def treated_backend(
    backend: Backend, *, socket: str, hang_ms: int, champion_ms: int, champion_scaled_to_zero: bool
) -> str:
    """Return the backend of treated requests.

    Args:
        backend: the treatment's application.
        socket: address of the frontend from `frontend`.
        hang_ms: if a replica does not answer a health check within this time, it is marked as down.
        champion_ms: timeout of the champion's answer.
        champion_scaled_to_zero: whether any champion is scaled to zero.
    """
    name = f"{backend.name}{SUFFIX}"
    answer_ms = champion_ms if champion_scaled_to_zero else hang_ms * _ANSWER_TIMEOUT_IN_HANGS
    retried = f"conn-failure empty-response {TRY_ANOTHER}" + (
        "" if champion_scaled_to_zero else " response-timeout"
    )
    some_up = "\n".join([*network_rules(backend.servers), *acl_any_up("some_up", name, backend.servers)])
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
