"""Tests of `cluster.status` with the edge's metrics."""

from __future__ import annotations

from cluster.status import servers_down

METRICS = """# TYPE haproxy_server_status gauge
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20109",state="DOWN"} 0
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20109",state="UP"} 1
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20112",state="DOWN"} 1
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20112",state="UP"} 0
haproxy_server_status{proxy="loan-v1",server="starting",state="DOWN"} 1
haproxy_server_status{proxy="loan-v2",server="127.0.0.1_20113",state="DOWN"} 0
haproxy_server_status{proxy="loan-v2",server="127.0.0.1_20113",state="MAINT"} 1
"""


def test_replica_that_fails_health_checks_is_listed() -> None:
    """Serve still reports its application as RUNNING."""
    assert servers_down(METRICS) == {"loan-v1": ["127.0.0.1:20112"]}


def test_metrics_without_servers_give_no_entry() -> None:
    """An edge that just started has none."""
    assert servers_down("") == {}
