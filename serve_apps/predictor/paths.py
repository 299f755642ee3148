"""Find out a request's operation from its path: `:predict`, or an operation of the Open Inference Protocol."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from cluster.errors import ModelNotFound
from cluster.security.authorization.policy import Action
from serve_apps.predictor.request import shortened
from serve_apps.replica.http import MethodNotAllowed

_BY_KEY = re.compile(r"/v1/models/([^/]+):predict")
_BY_TENSORS = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready)?")


class Operation(enum.Enum):
    """Operation on the model."""

    predict = "predict"
    infer = "infer"
    metadata = "metadata"
    ready = "ready"

    @property
    def method(self) -> str:
        """HTTP method of the operation."""
        return "POST" if self in (Operation.predict, Operation.infer) else "GET"

    @property
    def action(self) -> Action:
        """Action that the policies decide about."""
        return Action.predict if self in (Operation.predict, Operation.infer) else Action.read_metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """An operation, and the version that the path names."""

    operation: Operation
    version: str | None = None
    """Version in the path. None means the version that serves."""

    def check_version(self, name: str, version: int) -> None:
        """Require that the path names no version, or this replica's version. The edge ignores a version in the path.

        Raises:
            ModelNotFound: the path names another version.
        """
        if self.version not in (None, str(version)):
            raise ModelNotFound(
                f"Model '{name}' answers this request with version {version}, not with {shortened(self.version)}. "
                "Leave the version out, or name the one that the model's metadata gives."
            )


def parse_call(method: str, path: str, *, model: str) -> Call:
    """Parse a request's method and path.

    Args:
        method: HTTP method.
        path: path without the application's prefix.
        model: name of the model that the replica serves.

    Raises:
        ModelNotFound: the path is unknown, or names another model.
        MethodNotAllowed: the path needs another method.
    """
    call = _parse_path(path, model)
    if call is None:
        raise ModelNotFound(f"{method} {shortened(path)} is not served here; this replica serves '{model}'.")
    allowed = call.operation.method
    if method != allowed:
        raise MethodNotAllowed(f"This path takes {allowed}.", allow=allowed)
    return call


def _parse_path(path: str, model: str) -> Call | None:
    if (match := _BY_KEY.fullmatch(path)) and match[1] == model:
        return Call(operation=Operation.predict)
    if (match := _BY_TENSORS.fullmatch(path)) and match[1] == model:
        operation = Operation(match[3][1:]) if match[3] else Operation.metadata
        return Call(operation=operation, version=match[2])
    return None
