"""How much memory and how many connections a client can take.

One of HAProxy's buffers holds a request's head and as much of its body as can be sent again to another replica. An
active request takes up to six of them (both directions, to client and replica, and the copy for sending again), so the
1,500 that a tenant may have open take at most 300 MiB. Nobody else's wait for anything: a body is waited for only when
its token has held, so a stranger's request is answered and gone. (With `option http-buffer-request` it was kept, before
any rule, at 36 KiB for each stream of each connection.) The login is a stranger's form; few are read at one time. A
head that does not fit is refused, and one that does not come is ended after ten seconds.

An address is what one subscriber has: of IPv6, a whole /64.
"""

from __future__ import annotations

from serve_apps.edge.haproxy.answers import refuse

BUFFER_BYTES = 32_768
MAX_STREAMS = 50
"""Of one HTTP/2 connection at one time; each is a request of its own."""
BODY_S = 10
MAX_LOGINS = 16
_MAX_LENGTH_DIGITS = 10
"""HAProxy would read a longer number as another one, or as none."""
_TABLE = "addresses_counted"
_LOGINS = "logins_counted"
_NUMBER, _LOGINS_NUMBER = 4, 5
"""Of the counters in HAProxy. The first four are two of `limiting` and one each of `strangers` and `token_checks`: of
two rules with one number only the first would count."""


def tuning() -> str:
    """Lines of the global section."""
    return f"""    tune.bufsize {BUFFER_BYTES}
    tune.h2.fe.max-concurrent-streams {MAX_STREAMS}
    tune.stick-counters {_LOGINS_NUMBER + 1}"""


def tables() -> str:
    """The sections that count each address's connections, and logins."""
    return f"""backend {_TABLE}
    stick-table type ipv6 size 100k expire 1m store conn_cur

backend {_LOGINS}
    stick-table type string len 9 size 1 store conn_cur
"""


def rules(max_of_one_address: int) -> str:
    """Rules that close a connection, before its handshake, to who has too many of them; a frontend's."""
    return f"""    tcp-request connection track-sc{_NUMBER} src,ipmask(32,64) table {_TABLE}
    tcp-request connection reject if {{ sc_conn_cur({_NUMBER}) gt {max_of_one_address} }}"""


def stated_length(max_body_bytes: int) -> str:
    """Rules that refuse a body by the length that its head states, before it is waited for."""
    length = "req.fhdr(content-length)"
    odd = refuse(400, "Content-Length is no number of at most 10 digits.")
    return f"""    {odd} if {{ {length} -m len gt {_MAX_LENGTH_DIGITS} }}
    {refuse(413, "The body is too large.")} if {{ {length} -m int gt {max_body_bytes} }}"""


def body() -> str:
    """The rule that waits for a body, or as much of it as fits, so that it can be sent again."""
    return f"    http-request wait-for-body time {BODY_S}s if METH_POST"


def login_body(login: str) -> str:
    """Rules that wait for the body of a login.

    Args:
        login: the condition that a request is one.
    """
    many = f"{{ sc_conn_cur({_LOGINS_NUMBER}) gt {MAX_LOGINS} }}"
    return f"""    http-request track-sc{_LOGINS_NUMBER} str(logins) table {_LOGINS} if {login}
    {refuse(429, "Too many are signing in; try again.")} hdr retry-after 1 if {login} {many}
    http-request wait-for-body time {BODY_S}s if {login}"""
