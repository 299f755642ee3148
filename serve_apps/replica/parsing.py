"""How the servers here parse a request: its head counts, the fields behind a chunked body (trailers) do not.

Uvicorn (0.54) appends trailers to the request's headers. A client could so add headers that the edge, which looks at
heads only, never sees. Nothing here reads trailers, and RFC 9110 (6.5.1) lets a recipient drop them. Nor does anything
here speak another protocol, so a request for an upgrade gets an ordinary answer, as RFC 9110 (7.8) lets a server do.
Uvicorn has no setting for the first, and Serve passes on none for the second, so its class is changed.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_on_headers_complete = HttpToolsProtocol.on_headers_complete


def _without_trailers(protocol: HttpToolsProtocol) -> None:
    _on_headers_complete(protocol)
    protocol.headers = []  # the scope keeps its list; fields that come from here on go nowhere


def _never(protocol: HttpToolsProtocol) -> bool:
    return False


def parse_heads_only() -> None:
    """Have all servers of this process do so; a second call changes nothing."""
    methods = {"on_headers_complete": _without_trailers, "_should_upgrade": _never}
    for name, method in methods.items():
        setattr(HttpToolsProtocol, name, method)
