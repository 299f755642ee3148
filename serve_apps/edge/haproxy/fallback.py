"""The champion answers where a treatment's replicas do not: those that are dead, those that hang, and in between.

Each model's backend exists twice. The plain one is patient: a replica that is only busy must not be taken out, because
nobody else might be there. The other is for treated requests and is not, because behind its replicas stands the
champion, as a backup server that leads back into this HAProxy: one refused connection or one health check without an
answer takes a replica out. What a killed one had not answered is sent to the next, or to the champion, at once; what a
hanging one has, when it has waited ten times as long. (HAProxy could end these at once, too, but would then sometimes
end a request of a killed replica that is just being sent again.) Such requests keep their arm, and their access record
says `fallback`.

The champion has its own patience, though it is asked through such a backend: it would else be asked again for an answer
that it is working on. So what finds no replica is sent once and waits as long as elsewhere; and while a champion is
asleep, so does everything, though a request in a hanging replica then waits for that long, too.
"""

from __future__ import annotations

from serve_apps.edge.haproxy import connections
from serve_apps.edge.haproxy.answers import refuse
from serve_apps.edge.haproxy.backends import HEALTH_CHECK, any_up, server_name
from serve_apps.edge.haproxy.routes import Backend
from serve_apps.replica.edge_headers import VARIANT
from serve_apps.rollout.assignment import CHAMPION_VARIANT

SUFFIX = ":treated"
_SERVER = CHAMPION_VARIANT
_CONNECT_MS = 500
"""A retry of a refused connection waits no longer than this."""
_CHECK_EVERY_MS = 200
_ANSWER_IN_HANGS = 10


def frontend(*, map_file: str, socket: str) -> str:
    """Where a treated request comes in again: its path begins with the treatment's application."""
    return f"""frontend again
    bind unix@{socket} mode 600
    http-request set-var(txn.model) path,field(5,/),field(1,:)
    http-request set-var(txn.backend) var(txn.model),map_str({map_file}),field(1,|)
    {refuse(503, "No healthy replica; try again.")} unless {{ var(txn.backend),nbsrv -m int gt 0 }}
{connections.body()}
    http-request set-header {VARIANT} {CHAMPION_VARIANT}
    http-request set-var(txn.rest) path,regsub(^/[^/]+,)
    http-request set-path /%[var(txn.backend)]%[var(txn.rest)]
    use_backend %[var(txn.backend)]
"""


def recorded() -> str:
    """Rules that have the access record say who answered; a frontend's."""
    answered = f"if {{ srv_name -m str {_SERVER} }}"
    return f"""    http-response set-var(txn.fallback) bool(true) {answered}
    http-response set-var(txn.variant) str({CHAMPION_VARIANT}) {answered}"""


def treated(backend: Backend, *, socket: str, hang_ms: int, champion_ms: int, asleep: bool) -> str:
    """The backend of treated requests.

    Args:
        backend: the treatment's.
        socket: of the frontend above.
        hang_ms: how long a replica may leave a health check without an answer.
        champion_ms: how long the champion may take.
        asleep: whether a champion has to be woken first.
    """
    name = f"{backend.name}{SUFFIX}"
    answer_ms = champion_ms if asleep else hang_ms * _ANSWER_IN_HANGS
    retried = "conn-failure empty-response" + ("" if asleep else " response-timeout")
    some = "\n".join(any_up("some_up", name, backend.servers))
    servers = "\n".join(f"    server {server_name(address)} {address} check" for address in backend.servers)
    every = f"inter {_CHECK_EVERY_MS}ms fastinter {_CHECK_EVERY_MS // 2}ms downinter {_CHECK_EVERY_MS}ms"
    gone = "observe layer4 error-limit 1 on-error mark-down"
    return f"""backend {name}
    balance leastconn
    timeout connect {_CONNECT_MS}ms
    timeout server {answer_ms}ms
    retry-on {retried}
{some}
    http-request set-timeout server {champion_ms}ms unless some_up
    http-request disable-l7-retry unless some_up
    timeout check {hang_ms}ms
{HEALTH_CHECK}
    default-server {every} fall 1 rise 1 {gone}
{servers}
    server {_SERVER} unix@{socket} backup
"""
