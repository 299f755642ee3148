"""Make the HTTP servers ignore trailers (fields after a chunked body) and requests for a protocol upgrade.

Uvicorn (0.54) appends trailers to the request's headers. The edge reads only heads, so a client could add headers that
the edge does not see. No application reads trailers, and RFC 9110 (6.5.1) allows a recipient to ignore them. No
application supports another protocol. So a request for an upgrade gets a normal answer, which RFC 9110 (7.8) allows.
Uvicorn has no setting for trailers. It has a setting for upgrades, but Serve does not use it. So this module changes
uvicorn's class.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_on_headers_complete = HttpToolsProtocol.on_headers_complete


def _without_trailers(protocol: HttpToolsProtocol) -> None:
    _on_headers_complete(protocol)
    protocol.headers = []  # the request's scope has the old list; trailers are appended to this new one


def _never_upgrade(protocol: HttpToolsProtocol) -> bool:
    return False


def parse_heads_only() -> None:
    """Make all servers of this process ignore trailers and upgrades. A second call changes nothing."""
    methods = {"on_headers_complete": _without_trailers, "_should_upgrade": _never_upgrade}
    for name, method in methods.items():
        setattr(HttpToolsProtocol, name, method)
