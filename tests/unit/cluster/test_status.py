"""Tests of `cluster.status` with the edge's metrics."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.status import servers_down, silent_replicas
from tests.servers.ports import free_port
from tests.servers.replica import record

METRICS = """# TYPE haproxy_server_status gauge
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20109",state="DOWN"} 0
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20109",state="UP"} 1
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20112",state="DOWN"} 1
haproxy_server_status{proxy="loan-v1",server="127.0.0.1_20112",state="UP"} 0
haproxy_server_status{proxy="loan-v1",server="starting",state="DOWN"} 1
haproxy_server_status{proxy="loan-v2",server="127.0.0.1_20113",state="DOWN"} 0
haproxy_server_status{proxy="loan-v2",server="127.0.0.1_20113",state="MAINT"} 1
"""
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("listens", flush=True)
server.handle_request()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_record_without_an_owner_belongs_to_the_owner_of_the_state_folder(tmp_path: Path) -> None:
    """Earlier releases recorded no user. Root can read the status of another user's cluster too."""
    port, python = free_port(), shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no python3 that every user may run")
    os.chown(tmp_path, 65534, 65534)
    cluster = replace(record(tmp_path, "", 1), owner_uid=None, metrics_url=f"http://127.0.0.1:{port}/metrics")
    with subprocess.Popen(
        [python, "-c", SERVER, str(port), METRICS],
        user=65534,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listens\n"
            assert silent_replicas(cluster) == {"loan-v1": ["127.0.0.1:20112"]}
        finally:
            server.kill()


def test_replica_that_fails_health_checks_is_listed() -> None:
    """Serve still reports its application as RUNNING."""
    assert servers_down(METRICS) == {"loan-v1": ["127.0.0.1:20112"]}


def test_metrics_without_servers_give_no_entry() -> None:
    """An edge that just started has none."""
    assert servers_down("") == {}
