"""HAProxy backends of Serve applications, and the backend of the readiness check.

A champion has no fallback. If it has no replica, for example because its only replica was killed, its requests wait.
HAProxy sends them to Serve's proxy, which holds them until a replica is up. The proxy is a backup server, so it gets
requests only if no replica is up. A treatment's requests do not wait, because the champion answers them at once (see
`fallback`).

A line of HAProxy's configuration has at most 64 words, and HAProxy evaluates every rule of a frontend for each of its
requests. So each rule for one server or one model has its own line, in a section that only sees the requests for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from serve_apps.edge.haproxy.answers import NO_ANSWER, answer_json, error_body, refuse
from serve_apps.edge.haproxy.routes import Backend, Routes
from serve_apps.replica.http_contract import TRY_ANOTHER
from serve_apps.replica.targets import uses_tls

HEALTH_CHECK = """    option httpchk GET /-/healthz
    http-check expect status 200,503"""
"""The status 503 counts as healthy. A replica that Serve stops answers health checks with 503 DRAINING, but it still
answers requests for half a minute. If it counted as dead, its version would have no replica until Serve names the next
one. An unhealthy replica answers 503, too, but Serve removes such a replica itself."""
AUTHORITY_FILE = "ca.pem"
"""Certificate of the nodes' authority, in the folder that the global section names as `ca-base`."""
READINESS = "readiness"
WAITING_SERVER = "starting"
"""Name of the server that holds requests until a replica is up."""
_READY = '{"ready":true}'
_CHECK_INTERVALS = "inter 500ms fastinter 200ms fall 2 rise 1"
_CHECK_MS = 1000
"""Timeout of a health check if there are several replicas. A single replica has more time, because it may be busy."""
_SILENT_MS = 1500
"""If a replica's node acknowledges no packet for this time, its connections end. Other replicas get its requests."""
UNREACHABLE = """    option srvtcpka
    srvtcpka-idle 1s
    srvtcpka-intvl 1s
    srvtcpka-cnt 2"""
"""TCP probes. A connection that only waits for an answer sends nothing that could stay without acknowledgement."""


def backend(application: Backend, *, serve_proxy: str, wake_timeout_s: float) -> str:
    """Return the backend of an application.

    Args:
        application: name and replicas of the application.
        serve_proxy: address of Serve's proxy, which holds requests while there is no replica. If the address is empty,
            such requests are refused.
        wake_timeout_s: for how many seconds a request may be held.
    """
    if application.scaled_to_zero:
        return scaled_to_zero_backend(application.name, application.servers, timeout_s=wake_timeout_s)
    waiting_rules = _waiting_rules(application, wake_timeout_ms=round(wake_timeout_s * 1000))
    lines = [
        f"backend {application.name}",
        "    balance leastconn",
        *network_rules(application.servers),
        *([f"    timeout check {_CHECK_MS}ms"] if len(application.servers) > 1 else []),
        HEALTH_CHECK,
        f"    default-server {_CHECK_INTERVALS} on-error fastinter observe layer4",
        *(waiting_rules if serve_proxy else []),
        *server_lines(application.servers),
        *(
            [f"    server {WAITING_SERVER} {serve_proxy} check{_tls(serve_proxy)} backup"]
            if serve_proxy
            else []
        ),
    ]
    return "\n".join([*lines, ""])


def scaled_to_zero_backend(name: str, servers: Sequence[str], *, timeout_s: float) -> str:
    """Return the backend of an application without replicas. Serve starts the first replica when a request arrives.

    HAProxy sends a request again only if the connection failed. Otherwise, one request could start several replicas and
    be answered by each of them.
    """
    lines = "\n".join(server_lines(servers))
    return f"""backend {name}
    balance leastconn
    timeout server {round(timeout_s * 1000)}ms
    retry-on conn-failure
    option httpchk GET /-/healthz
    default-server {_CHECK_INTERVALS}
{lines}
"""


def readiness(routes: Routes) -> str:
    """Return the backend that answers whether every champion has a replica or is scaled to zero."""
    by_name = {backend.name: backend for backend in routes.backends}
    lines = []
    for number, name in enumerate(routes.champions):
        champion = by_name.get(name)
        if champion is None or not champion.servers:
            return "\n".join([f"backend {READINESS}", f"    {_refuse_unready(name)}", ""])
        acl = f"up_{number}"
        lines += [*acl_any_up(acl, name, champion.servers), f"    {_refuse_unready(name)} unless {acl}"]
    return "\n".join([f"backend {READINESS}", *lines, f"    {answer_json(_READY)}", ""])


def acl_any_up(acl: str, name: str, servers: Iterable[str]) -> list[str]:
    """Return the lines of an ACL that is true if at least one server of a backend is up."""
    return [f"    acl {acl} srv_is_up({name}/{server_name(address)})" for address in servers]


def server_lines(addresses: Iterable[str]) -> list[str]:
    """Return one line for each server of a backend."""
    return [f"    server {server_name(address)} {address} check{_tls(address)}" for address in addresses]


def network_rules(addresses: Iterable[str]) -> list[str]:
    """Return rules that end connections to nodes that are cut off; none if all servers are on loopback."""
    return [UNREACHABLE] if any(map(uses_tls, addresses)) else []


def _tls(address: str) -> str:
    """Return the options of a server on another machine, with a leading space; empty for one on loopback.

    HAProxy compares the name with the certificate's DNS names and its common name, not with its IP addresses. So a
    node's certificate has its address as a DNS name, too.
    """
    if not uses_tls(address):
        return ""
    return f" tcp-ut {_SILENT_MS} ssl verify required ca-file {AUTHORITY_FILE} verifyhost {address.rpartition(':')[0]}"


def server_name(address: str) -> str:
    """Return HAProxy's name for the server with this address."""
    return re.sub(r"[^A-Za-z0-9.]", "_", address)


def json_errors_only() -> str:
    """Return rules for errors: those that are not JSON, such as those of Serve's proxy, are replaced by a JSON error.

    If no replica could write its record, the client gets 503.
    """
    return (
        f"    http-response set-status 503 if {{ status {TRY_ANOTHER} }} "
        "{ res.hdr(content-type) -m beg application/json }\n"
        "    http-response return status 503 content-type application/json "
        f"string '{error_body(503, NO_ANSWER)}' if {{ status 404 500 502 503 504 }} !dashboard "
        "!{ res.hdr(content-type) -m beg application/json }"
    )


def _waiting_rules(application: Backend, *, wake_timeout_ms: int) -> list[str]:
    """Return rules for requests that wait for a replica: send each only once, with the timeout for a start."""
    condition = " unless replicas_up" if application.servers else ""
    return [
        *acl_any_up("replicas_up", application.name, application.servers),
        f"    http-request set-timeout server {wake_timeout_ms}ms{condition}",
        f"    http-request disable-l7-retry{condition}",
    ]


def _refuse_unready(name: str) -> str:
    return refuse(503, f"Champion {name} has no healthy replica.")
