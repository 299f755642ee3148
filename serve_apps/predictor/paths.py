"""Which operation of a replica a path names: the protocol's with or without a version in it, and the call by key."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from cluster.errors import ModelNotFound
from cluster.security.authorization.policy import Action
from serve_apps.predictor.request import shown
from serve_apps.replica.http import MethodNotAllowed

_BY_KEY = re.compile(r"/v1/models/([^/]+):predict")
_BY_TENSORS = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready)?")


class Operation(enum.Enum):
    """What is asked of the model."""

    predict = "predict"
    infer = "infer"
    metadata = "metadata"
    ready = "ready"

    @property
    def method(self) -> str:
        """The HTTP method that it takes."""
        return "POST" if self in (Operation.predict, Operation.infer) else "GET"

    @property
    def action(self) -> Action:
        """What the policies call it."""
        return Action.predict if self in (Operation.predict, Operation.infer) else Action.read_metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """An operation on a model."""

    operation: Operation
    version: str | None = None
    """That the path names; none takes the one that serves."""

    def check_version(self, name: str, version: int) -> None:
        """Refuse a version that is not the one here; the edge chooses by the split, not by the path.

        Raises:
            ModelNotFound
        """
        if self.version not in (None, str(version)):
            raise ModelNotFound(
                f"Model '{name}' answers this request with version {version}, not with {shown(self.version)}. "
                "Leave the version out, or name the one that the model's metadata gives."
            )


def call(method: str, path: str, *, model: str) -> Call:
    """What a request asks of a replica.

    Args:
        method: of the HTTP request.
        path: without the application's prefix.
        model: the one that the replica serves.

    Raises:
        ModelNotFound: another path, or another model's.
        MethodNotAllowed
    """
    found = _of(path, model)
    if found is None:
        raise ModelNotFound(f"{method} {shown(path)} is not served here; this replica serves '{model}'.")
    wanted = found.operation.method
    if method != wanted:
        raise MethodNotAllowed(f"This path takes {wanted}.", allow=wanted)
    return found


def _of(path: str, model: str) -> Call | None:
    if (match := _BY_KEY.fullmatch(path)) and match[1] == model:
        return Call(operation=Operation.predict)
    if (match := _BY_TENSORS.fullmatch(path)) and match[1] == model:
        operation = Operation(match[3][1:]) if match[3] else Operation.metadata
        return Call(operation=operation, version=match[2])
    return None
