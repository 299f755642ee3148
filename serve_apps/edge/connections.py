"""How much memory and how many connections a client can take.

One of HAProxy's buffers holds a request's head and as much of its body as can be sent again to another replica. An
active request takes up to six of them (both directions, to client and replica, and the copy for sending again), so
2,000 at once at most 400 MiB. A head that does not fit is refused, and one that does not come is ended after ten
seconds.
"""

from __future__ import annotations

BUFFER_BYTES = 32_768
MAX_STREAMS = 50
"""Of one HTTP/2 connection at one time; each is a request of its own."""
_TABLE = "addresses_counted"
_NUMBER = 4
"""Of the counter in HAProxy. The first four are two of `limiting` and one each of `strangers` and `token_checks`: of
two rules with one number only the first would count."""


def tuning() -> str:
    """Lines of the global section."""
    return f"""    tune.bufsize {BUFFER_BYTES}
    tune.h2.fe.max-concurrent-streams {MAX_STREAMS}
    tune.stick-counters {_NUMBER + 1}"""


def table() -> str:
    """The section that counts each address's connections."""
    return f"backend {_TABLE}\n    stick-table type ipv6 size 100k expire 1m store conn_cur\n"


def rules(max_of_one_address: int) -> str:
    """Rules that close a connection, before its handshake, to who has too many of them; a frontend's."""
    return f"""    tcp-request connection track-sc{_NUMBER} src table {_TABLE}
    tcp-request connection reject if {{ sc_conn_cur({_NUMBER}) gt {max_of_one_address} }}"""
