"""A client that calls the edge like any application: over TLS, with a token."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.integration.conftest import Project


@dataclass
class Client:
    """A client application of one project."""

    project: Project

    def __post_init__(self) -> None:
        self.port = self.project.record.ports["edge"]
        self.context = ssl.create_default_context(cafile=str(self.project.storage_root / "tls" / "ca.pem"))
        self.token = self.project.token()

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        token: str | None = "",
        unit: str | None = None,
        method: str = "POST",
    ) -> tuple[int, dict[str, Any]]:
        """Send one request, and return its status and JSON. `token=None` sends no token."""
        headers = {} if token is None else {"Authorization": f"Bearer {token or self.token}"}
        headers |= {} if unit is None else {"X-Unit-ID": unit}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=30)
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        return response.status, content
