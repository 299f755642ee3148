"""What Serve says of its applications, through Ray's dashboard."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from cluster.session import ClusterRecord

TIMEOUT_S = 10


def deployment(record: ClusterRecord, app: str) -> dict[str, Any]:
    """Return the state of the deployment of a model version."""
    request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
    request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        found: dict[str, Any] = json.load(response)["applications"][app]["deployments"]["predictor"]
    return found


def running_replicas(record: ClusterRecord, app: str) -> set[str]:
    """Return the ids of the replicas of a model version that run."""
    return {one["replica_id"] for one in deployment(record, app)["replicas"] if one["state"] == "RUNNING"}
