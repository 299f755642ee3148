"""A standard client of the Open Inference Protocol: NVIDIA's client, over TLS, with a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gevent.ssl
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype


@dataclass
class StockClient:
    """A client of one edge."""

    address: str
    ca_file: str
    token: str

    def __post_init__(self) -> None:
        self.client = triton.InferenceServerClient(
            self.address,
            ssl=True,
            ssl_context_factory=lambda: gevent.ssl.create_default_context(cafile=self.ca_file),
        )

    @property
    def headers(self) -> dict[str, str]:
        """Return a new dict on each call, because NVIDIA's client adds its own headers to the dict."""
        return {"Authorization": f"Bearer {self.token}"}

    def infer(
        self,
        model: str,
        columns: dict[str, np.ndarray[Any, Any]],
        *,
        raw: bool,
        version: str = "",
        outputs: list[Any] | None = None,
        request_id: str = "",
    ) -> Any:
        """Send a request, and return the result of NVIDIA's client. An object array is sent as BYTES."""
        inputs = []
        for name, values in columns.items():
            datatype = np_to_triton_dtype(values.dtype)
            given = triton.InferInput(name, list(values.shape), datatype)
            inputs.append(given.set_data_from_numpy(values, binary_data=raw))
        return self.client.infer(
            model, inputs, model_version=version, outputs=outputs, request_id=request_id, headers=self.headers
        )

    def close(self) -> None:
        self.client.close()


def wanted(name: str, *, raw: bool) -> Any:
    """Return the request for one output, by name."""
    return triton.InferRequestedOutput(name, binary_data=raw)
