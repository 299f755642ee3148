"""HAProxy's backends of Serve applications, and the one that says whether all champions are ready.

Nobody stands in for a champion. Where it has no replica, because the only one was killed say, its requests are held:
they go to Serve's proxy, which waits for the next replica. The proxy is a backup server, so it is asked only then. A
treatment is not held, because its champion answers at once (see `fallback`).

A line of HAProxy's configuration has at most 64 words, and a request passes every rule of its frontend. So what there
is for each server or model is a line of its own, in a section that only its own requests pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from serve_apps.edge.haproxy.answers import NO_ANSWER, error_body, refuse, say
from serve_apps.edge.haproxy.routes import Backend, Routes

HEALTH_CHECK = """    option httpchk GET /-/healthz
    http-check expect status 200,503"""
"""A replica that Serve takes away answers health checks by 503 DRAINING from then on, and requests for half a minute.
If it counted as dead, its version would have nobody until the edge has heard from Serve who comes next. One that Serve
finds unwell says 503, too; Serve then takes it away by itself."""
READINESS = "readiness"
STARTING = "starting"
"""The server that holds requests."""
_READY = '{"ready":true}'
_EVERY = "inter 500ms fastinter 200ms fall 2 rise 1"


def backend(one: Backend, *, holder: str, wake_timeout_s: float) -> str:
    """The backend of an application.

    Args:
        one: the application, and its replicas.
        holder: address of what holds requests while there is no replica; empty where nothing does.
        wake_timeout_s: how long a request is held.
    """
    if one.asleep:
        return waking_backend(one.name, one.servers, timeout_s=wake_timeout_s)
    lines = [
        f"backend {one.name}",
        "    balance leastconn",
        HEALTH_CHECK,
        f"    default-server {_EVERY} on-error fastinter observe layer4",
        *(_held(one, wake_timeout_ms=round(wake_timeout_s * 1000)) if holder else []),
        *_servers(one.servers),
        *([f"    server {STARTING} {holder} check backup"] if holder else []),
    ]
    return "\n".join([*lines, ""])


def waking_backend(name: str, servers: Sequence[str], *, timeout_s: float) -> str:
    """The backend that waits for a start.

    Nothing is sent twice but what was never received: the one request would start, and be answered, several times.
    """
    lines = "\n".join(_servers(servers))
    return f"""backend {name}
    balance leastconn
    timeout server {round(timeout_s * 1000)}ms
    retry-on conn-failure
    option httpchk GET /-/healthz
    default-server {_EVERY}
{lines}
"""


def readiness(routes: Routes) -> str:
    """The backend that answers whether each champion has a replica; one that is asleep counts."""
    by_name = {one.name: one for one in routes.backends}
    lines = []
    for number, name in enumerate(routes.champions):
        found = by_name.get(name)
        if found is None or not found.servers:
            return "\n".join([f"backend {READINESS}", f"    {_unready(name)}", ""])
        lines += [*any_up(f"up_{number}", name, found.servers), f"    {_unready(name)} unless up_{number}"]
    return "\n".join([f"backend {READINESS}", *lines, f"    {say(_READY)}", ""])


def any_up(acl: str, name: str, servers: Iterable[str]) -> list[str]:
    """Lines of a condition that holds where one of a backend's servers is up."""
    return [f"    acl {acl} srv_is_up({name}/{server_name(address)})" for address in servers]


def server_name(address: str) -> str:
    """What a server is called."""
    return re.sub(r"[^A-Za-z0-9.]", "_", address)


def only_json() -> str:
    """A rule that puts an error of the contract in the place of one that Serve's proxy wrote."""
    return (
        "    http-response return status 503 content-type application/json "
        f"string '{error_body(503, NO_ANSWER)}' if {{ status 404 500 502 503 504 }} !dashboard "
        "!{ res.hdr(content-type) -m beg application/json }"
    )


def _held(one: Backend, *, wake_timeout_ms: int) -> list[str]:
    """Rules for requests that are held: each is sent once, and waits as long as for a version that is asleep."""
    condition = " unless replicas_up" if one.servers else ""
    return [
        *any_up("replicas_up", one.name, one.servers),
        f"    http-request set-timeout server {wake_timeout_ms}ms{condition}",
        f"    http-request disable-l7-retry{condition}",
    ]


def _servers(addresses: Iterable[str]) -> list[str]:
    return [f"    server {server_name(address)} {address} check" for address in addresses]


def _unready(name: str) -> str:
    return refuse(503, f"Champion {name} has no healthy replica.")
