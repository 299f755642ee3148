"""An edge that will end is not ready any more, and still answers."""

from __future__ import annotations

from cluster.node.edge_leaving import LEAVE_COMMAND
from tests.servers.edge import ROLLOUT, Edge


def test_load_balancers_see_that_the_edge_will_end(edge: Edge) -> None:
    """Its readiness check fails. Requests that still arrive are answered."""
    try:
        assert edge.call("/v2/health/ready", method="GET")[0] == 200
        edge.ask(LEAVE_COMMAND)
        status, content = edge.call("/v2/health/ready", method="GET")
        assert (status, content["error"]) == (503, "This edge is leaving.")
        assert edge.call("/v2/health/live", method="GET")[0] == 200
        assert edge.call(token=edge.token())[0] == 200
    finally:
        edge.load(ROLLOUT)
