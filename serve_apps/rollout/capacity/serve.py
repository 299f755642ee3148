"""How many replicas each version has, and how many it may have, as Serve says."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.host.port_owner import open_own
from cluster.session import ClusterRecord

_TIMEOUT_S = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Replicas of one application."""

    ready: int
    """Replicas that run and have loaded the model."""
    minimum: int
    maximum: int
    """Equal to the minimum if the number of replicas is fixed."""

    @property
    def is_fixed(self) -> bool:
        return self.minimum == self.maximum


FetchCapacities = Callable[[], Mapping[str, Capacity]]
"""Returns the capacity of each application. It raises OSError or ValueError if Serve does not answer."""


def serve_capacities(record: ClusterRecord) -> FetchCapacities:
    """Return a function that fetches the capacities from Serve."""

    def fetch() -> Mapping[str, Capacity]:
        request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
        request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
        with open_own(request, owner=record.owner, timeout_s=_TIMEOUT_S) as response:
            return read_capacities(json.load(response))

    return fetch


def read_capacities(content: Mapping[str, Any]) -> dict[str, Capacity]:
    """Return the capacities in the answer of `/api/serve/applications/`. A version has one deployment.

    Raises:
        ValueError: The answer has another form.
    """
    try:
        return {
            name: _capacity(deployment)
            for name, application in content["applications"].items()
            for deployment in application["deployments"].values()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Serve's answer has another form: {error!r}") from error


def _capacity(deployment: Mapping[str, Any]) -> Capacity:
    ready = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
    config = deployment["deployment_config"]
    scaling = config.get("autoscaling_config")
    if scaling is None:
        number = int(config["num_replicas"])
        return Capacity(ready=ready, minimum=number, maximum=number)
    return Capacity(ready=ready, minimum=int(scaling["min_replicas"]), maximum=int(scaling["max_replicas"]))
