"""Limits for the memory and connections of one client.

One HAProxy buffer contains a request's head and as much of its body as can be sent again to another replica. An active
request needs up to six buffers (both directions, to client and to replica, and the copy for a retry). So the 1,500
requests that a tenant may have open need at most 300 MiB.

Unauthenticated requests need no buffers for a body. HAProxy waits for a body only after the token was verified, so an
unauthenticated request is answered at once. (With `option http-buffer-request`, HAProxy stored the body first, with
36 KiB for each stream of each connection.) The only exception is the login form; few are read at the same time.

A head that does not fit into the buffer is refused. If a head does not arrive within ten seconds, the connection ends.
One address counts as one client. For IPv6, a whole /64 counts as one address.
"""

from __future__ import annotations

from serve_apps.edge.haproxy.answers import refuse
from serve_apps.edge.haproxy.counters import Counter

BUFFER_BYTES = 32_768
MAX_STREAMS = 50
"""Largest number of concurrent requests (streams) of one HTTP/2 connection."""
BODY_S = 10
"""Largest number of seconds to wait for a body."""
MAX_LOGINS = 16
"""At most this many login bodies are read at the same time."""
_MAX_LENGTH_DIGITS = 10
"""If Content-Length has more digits, HAProxy reads it as another number, or as missing."""
_ADDRESS_TABLE = "addresses_counted"
_LOGIN_TABLE = "logins_counted"


def tuning() -> str:
    """Return lines of the global section: buffer size, streams of a connection, and number of counters."""
    return f"""    tune.bufsize {BUFFER_BYTES}
    tune.h2.fe.max-concurrent-streams {MAX_STREAMS}
    tune.stick-counters {len(Counter)}"""


def tables() -> str:
    """Return the sections of two tables: one counts open connections by address, the other logins."""
    return f"""backend {_ADDRESS_TABLE}
    stick-table type ipv6 size 100k expire 1m store conn_cur

backend {_LOGIN_TABLE}
    stick-table type string len 9 size 1 store conn_cur
"""


def rules(max_of_one_address: int) -> str:
    """Return a frontend's rules that close a connection before its TLS handshake, if its address has too many open."""
    number = int(Counter.connections)
    return f"""    tcp-request connection track-sc{number} src,ipmask(32,64) table {_ADDRESS_TABLE}
    tcp-request connection reject if {{ sc_conn_cur({number}) gt {max_of_one_address} }}"""


def check_length(max_body_bytes: int) -> str:
    """Return rules that refuse a too large Content-Length before HAProxy waits for the body."""
    length = "req.fhdr(content-length)"
    unreadable = refuse(400, f"Content-Length must be a number of at most {_MAX_LENGTH_DIGITS} digits.")
    return f"""    {unreadable} if {{ {length} -m len gt {_MAX_LENGTH_DIGITS} }}
    {refuse(413, "The body is too large.")} if {{ {length} -m int gt {max_body_bytes} }}"""


def wait_for_body() -> str:
    """Return the rule that waits for a body, or for as much as fits into a buffer, so that it can be sent again."""
    return f"    http-request wait-for-body time {BODY_S}s if METH_POST"


def wait_for_login_body(login: str) -> str:
    """Return rules that wait for the body of a login.

    Args:
        login: HAProxy condition that is true for a login request.
    """
    number = int(Counter.logins)
    too_many = f"{{ sc_conn_cur({number}) gt {MAX_LOGINS} }}"
    return f"""    http-request track-sc{number} str(logins) table {_LOGIN_TABLE} if {login}
    {refuse(429, "Too many sign-ins at the same time; try again.")} hdr retry-after 1 if {login} {too_many}
    http-request wait-for-body time {BODY_S}s if {login}"""
