"""Access control in front of a key store: verify the token, check the policy, then run the operation.

Token and policy are checked again for every request. Both checks are callables, so this module depends on neither token
formats nor the policy language. If a check fails with an error, the request is denied.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cluster.errors import AccessDenied, FalajError, InvalidRequest, Unauthenticated
from cluster.security.keys.store import (
    COLUMN_CLASSES,
    KeyInfo,
    KeyNotFound,
    KeyRevoked,
    KeyStore,
    KeyStoreUnavailable,
    check_name,
)
from cluster.security.keys.wire import error_to_plain

MAX_AUDITED_CHARS = 200
NODE_REGION = "node_region"
"""Field of a request from another node: the node's region. The head's service for nodes sets it from the ledger."""


class Operation(enum.StrEnum):
    """Operation of the key store that a request names."""

    ensure = "ensure"
    info = "info"
    wrap = "wrap"
    unwrap = "unwrap"
    rewrap = "rewrap"
    rotate = "rotate"
    revoke = "revoke"
    names = "names"
    widen = "widen"
    """No request can name this operation. It is checked if an `ensure` would allow more uses of a key than before."""


class Caller(Protocol):
    """A verified identity."""

    @property
    def subject(self) -> str:
        """Name of the caller, for messages."""


class Verdict(Protocol):
    """A policy's decision."""

    @property
    def allowed(self) -> bool:
        """Whether the operation may run."""

    @property
    def policies(self) -> tuple[str, ...]:
        """Ids of the deciding policies."""


C = TypeVar("C", bound=Caller)


@dataclass(frozen=True, kw_only=True, slots=True)
class Denial(Generic[C]):
    """A request that was denied."""

    principal: C | None
    """None if no identity could be verified."""
    operation: str
    name: str
    reason: str
    policies: tuple[str, ...] = ()


class Gate(Generic[C]):
    """Answers requests to a key store.

    Args:
        store: the key store.
        verify: returns a token's principal or raises Unauthenticated.
        decide: decides whether a principal may do an operation with a key.
        audit: receives every denial. It must not block for long. Its errors are logged and do not undo a denial.
        relabelling: called before a key's description changes, with the principal, the old and the new description. If
            it raises an error, the key stays unchanged.
        locate: adds the region of another node, which sent the request, to a principal. Without it, these are denied.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        verify: Callable[[str], C],
        decide: Callable[[C, Operation, KeyInfo], Verdict],
        audit: Callable[[Denial[C]], None],
        relabelling: Callable[[C, KeyInfo, KeyInfo], None] = lambda principal, old, new: None,
        locate: Callable[[C, str], C] | None = None,
    ) -> None:
        self._store = store
        self._verify = verify
        self._decide = decide
        self._audit = audit
        self._relabelling = relabelling
        self._locate = locate
        self._changes = threading.Lock()

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """Return the answer to a request, whatever the request contains. It never raises an error."""
        try:
            return {"ok": True, "result": self._result(request)}
        except FalajError as error:
            return error_to_plain(error)
        except Exception as error:  # noqa: BLE001 (one bad request must not end the broker)
            # Log only the type: the message of an unexpected error could contain a secret.
            logging.getLogger(__name__).error("A request failed unexpectedly: %s.", type(error).__name__)
            return error_to_plain(
                KeyStoreUnavailable(
                    f"The key broker failed with an internal error ({type(error).__name__}); see its log."
                )
            )

    def refuse_connection(self, reason: str) -> dict[str, object]:
        """Audit a refused connection, and return the answer to send. Nothing is read from the connection."""
        self._deny(Denial(principal=None, operation="connect", name="", reason=reason))
        return error_to_plain(AccessDenied(f"The key broker refuses this connection: {reason}."))

    def _result(self, request: dict[str, object]) -> object:
        name = request.get("name", "")
        principal = self._principal(request, operation=_shown(request.get("op")), name=_shown(name))
        try:
            operation = Operation(str(request.get("op")))
            if operation is Operation.widen:
                raise ValueError(operation)
        except ValueError:
            supported = ", ".join(op for op in Operation if op is not Operation.widen)
            raise InvalidRequest(
                f"The key broker supports {supported}, not {_shown(request.get('op'))}."
            ) from None
        if operation is Operation.names:
            return self._names(principal)
        if operation is Operation.ensure:
            self._ensure(principal, KeyInfo.from_plain(request.get("info")))
            return None
        if operation in (Operation.rotate, Operation.revoke):
            return self._change(principal, operation, check_name(name))
        info = self._store.info(check_name(name))
        self._permit(principal, operation, info)
        return self._read(operation, info, request)

    def _read(self, operation: Operation, info: KeyInfo, request: dict[str, object]) -> object:
        match operation:
            case Operation.info:
                return info.plain()
            case Operation.wrap:
                return self._store.wrap(info.name, _decoded(request.get("secret")))
            case Operation.unwrap:
                return base64.b64encode(self._store.unwrap(info.name, _text(request.get("wrapped")))).decode()
            case _:
                return self._store.rewrap(info.name, _text(request.get("wrapped")))

    def _change(self, principal: C, operation: Operation, name: str) -> int | None:
        with self._changes:
            self._permit(principal, operation, self._changed(operation, name))
            if operation is Operation.rotate:
                return self._store.rotate(name)
            self._store.revoke(name)
            return None

    def _changed(self, operation: Operation, name: str) -> KeyInfo:
        """Return the description of a key that is about to change.

        A revoked key can be revoked again, to finish an interrupted revocation.
        """
        try:
            return self._store.info(name)
        except KeyRevoked as error:
            if operation is not Operation.revoke or error.info is None:
                raise
            return error.info

    def _ensure(self, principal: C, info: KeyInfo) -> None:
        # The policy is checked for the old and the new description, and `widen` too if the new one allows more.
        # Otherwise a principal that may create keys could change another key's description and read its data.
        with self._changes:
            old = None
            with contextlib.suppress(KeyNotFound):
                old = self._store.info(info.name)
                self._permit(principal, Operation.ensure, old)
            self._permit(principal, Operation.ensure, info)
            if old is not None and old != info:
                if widens(old, info):
                    self._permit(principal, Operation.widen, old)
                self._relabelling(principal, old, info)
            self._store.ensure(info)

    def _names(self, principal: C) -> list[str]:
        """Return the keys whose description the principal may read. The other keys are left out, without a denial."""
        names = []
        for name in self._store.names():
            with contextlib.suppress(KeyNotFound, KeyRevoked):  # the key was revoked between the two calls
                if self._refusal(principal, Operation.info, self._store.info(name)) is None:
                    names.append(name)
        return names

    def _principal(self, request: dict[str, object], *, operation: str, name: str) -> C:
        token = request.get("token")
        try:
            if not isinstance(token, str) or not token:
                raise Unauthenticated("The request to the key broker carries no token.")
            principal = self._verify(token)
            region = request.get(NODE_REGION)
            if region is None:
                return principal
            if self._locate is None or not isinstance(region, str):
                raise Unauthenticated("The key broker does not serve other nodes.")
            return self._locate(principal, region)
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, Unauthenticated)
                else f"{type(error).__name__} while verifying"
            )
            self._deny(Denial(principal=None, operation=operation, name=name, reason=reason))
            if isinstance(error, Unauthenticated):
                raise
            raise Unauthenticated("The token could not be verified.") from None

    def _permit(self, principal: C, operation: Operation, info: KeyInfo) -> None:
        """Require that the policy allows the operation. A denial is audited and raises AccessDenied."""
        denial = self._refusal(principal, operation, info)
        if denial is None:
            return
        self._deny(denial)
        purposes = ", ".join(info.purposes) or "any"
        raise AccessDenied(
            f"{principal.subject} may not {operation} with key '{info.name}' (class {info.column_class}, purposes "
            f"{purposes}): {denial.reason}. Ask with the role and purpose that the policy names."
        )

    def _refusal(self, principal: C, operation: Operation, info: KeyInfo) -> Denial[C] | None:
        """Return the denial of an operation, or None if the policy allows it."""
        policies: tuple[str, ...] = ()
        try:
            verdict = self._decide(principal, operation, info)
            if verdict.allowed is True:
                return None
            policies = tuple(verdict.policies)
            reason = f"denied by {', '.join(policies)}" if policies else "no policy allows it"
        except AccessDenied as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 (a failed decision is a denial)
            reason = f"the policy failed with {type(error).__name__}"
        return Denial(
            principal=principal, operation=operation, name=info.name, reason=reason, policies=policies
        )

    def _deny(self, denial: Denial[C]) -> None:
        try:
            self._audit(denial)
        except Exception as error:  # noqa: BLE001 (the denial stays in force)
            logging.getLogger(__name__).error("A denial could not be recorded: %s.", type(error).__name__)


def widens(old: KeyInfo, new: KeyInfo) -> bool:
    """Return whether a new description allows more uses of a key: it has a lower class, or another purpose."""
    lower = COLUMN_CLASSES.index(new.column_class) < COLUMN_CLASSES.index(old.column_class)
    return lower or (bool(old.purposes) and not (new.purposes and set(new.purposes) <= set(old.purposes)))


def _shown(value: object) -> str:
    """Return untrusted text, shortened and printable."""
    return ascii(value)[1:-1][:MAX_AUDITED_CHARS] if isinstance(value, str) else ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest("A wrapped secret must be text.")
    return value


def _decoded(value: object) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("A secret must be base64 text.") from None
