"""Let the servers ignore trailers (fields behind a chunked body) and requests for a protocol upgrade.

Uvicorn (0.54) appends trailers to the request's headers. So a client could add headers that the edge, which reads heads
only, never sees. No application reads trailers, and RFC 9110 (6.5.1) lets a recipient drop them. No application speaks
another protocol either, so a request for an upgrade gets a normal answer, as RFC 9110 (7.8) allows. Uvicorn has no
setting for trailers, and Serve does not pass on the one for upgrades, so this module changes uvicorn's class.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_on_headers_complete = HttpToolsProtocol.on_headers_complete


def _without_trailers(protocol: HttpToolsProtocol) -> None:
    _on_headers_complete(protocol)
    protocol.headers = []  # the request's scope has its own reference; later fields are appended to this list only


def _never_upgrade(protocol: HttpToolsProtocol) -> bool:
    return False


def parse_heads_only() -> None:
    """Change all servers of this process; a second call changes nothing."""
    methods = {"on_headers_complete": _without_trailers, "_should_upgrade": _never_upgrade}
    for name, method in methods.items():
        setattr(HttpToolsProtocol, name, method)
