"""A double of Serve's proxy. It holds the requests for an application until a replica is up."""

from __future__ import annotations

import threading

from tests.servers.edge import Echo, Mirror


class HoldingProxy(Mirror):
    """Echoes a request when the test allows it, or answers that the application is unknown."""

    def __init__(self) -> None:
        super().__init__(HoldingEcho)
        self.got_request, self.may_answer = threading.Event(), threading.Event()
        self.num_requests = 0
        self.unknown = False

    def stop(self) -> None:
        self.may_answer.set()
        super().stop()


class HoldingEcho(Echo):
    """Handler of one request. Health checks are answered at once."""

    def do_POST(self) -> None:
        assert isinstance(self.server, HoldingProxy)
        self.server.num_requests += 1
        self.server.got_request.set()
        self.server.may_answer.wait(10)
        if not self.server.unknown:
            super().do_POST()
            return
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(404)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", "14")
        self.end_headers()
        self.wfile.write(b"no application")

    do_GET = Echo.do_POST
