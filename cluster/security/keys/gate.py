"""In front of a key store: who asks, may they, and only then the operation.

A token is verified and the policy asked anew for every request. Both are callables, so that the gate knows neither
tokens nor the policy's language. What cannot be decided is denied.
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


class Operation(enum.StrEnum):
    """What a request asks of the key store."""

    ensure = "ensure"
    info = "info"
    wrap = "wrap"
    unwrap = "unwrap"
    rewrap = "rewrap"
    rotate = "rotate"
    revoke = "revoke"
    names = "names"
    widen = "widen"
    """No request: what an `ensure` is that opens a key to more than it was."""


class Caller(Protocol):
    """A verified identity."""

    @property
    def subject(self) -> str:
        """Who it is, for messages."""


class Verdict(Protocol):
    """A policy's decision."""

    @property
    def allowed(self) -> bool:
        """Whether the operation may run."""

    @property
    def policies(self) -> tuple[str, ...]:
        """The ids of the policies that decided."""


C = TypeVar("C", bound=Caller)


@dataclass(frozen=True, kw_only=True, slots=True)
class Denial(Generic[C]):
    """A request that was turned away."""

    principal: C | None
    """None where nobody could be verified."""
    operation: str
    name: str
    reason: str
    policies: tuple[str, ...] = ()


class Gate(Generic[C]):
    """Answers requests to a key store.

    Args:
        store: whose keys are asked for.
        verify: gives a token's principal or raises Unauthenticated.
        decide: whether a principal may do an operation with a key.
        audit: receives every denial. It must not block for long; what it raises is logged and does not undo a denial.
        relabelling: is told who is about to give a key another description; where it raises, the key stays as it is.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        verify: Callable[[str], C],
        decide: Callable[[C, Operation, KeyInfo], Verdict],
        audit: Callable[[Denial[C]], None],
        relabelling: Callable[[C, KeyInfo, KeyInfo], None] = lambda principal, old, new: None,
    ) -> None:
        self._store = store
        self._verify = verify
        self._decide = decide
        self._audit = audit
        self._relabelling = relabelling
        self._changes = threading.Lock()

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """The answer to a request, whatever is in it; never raises."""
        try:
            return {"ok": True, "result": self._result(request)}
        except FalajError as error:
            return error_to_plain(error)
        except Exception as error:  # noqa: BLE001 (one bad request must not end the broker)
            # Only the type: the message of an unforeseen error could carry a secret.
            logging.getLogger(__name__).error("A request failed unexpectedly: %s.", type(error).__name__)
            return error_to_plain(
                KeyStoreUnavailable(f"The key broker failed inside ({type(error).__name__}); see its log.")
            )

    def turn_away(self, reason: str) -> dict[str, object]:
        """Audit and answer a connection that is not even read."""
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
            known = ", ".join(each for each in Operation if each is not Operation.widen)
            raise InvalidRequest(f"The key broker knows {known}, not {_shown(request.get('op'))}.") from None
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
        """The description of a key that is about to be changed; to revoke it again finishes what was cut off."""
        try:
            return self._store.info(name)
        except KeyRevoked as error:
            if operation is not Operation.revoke or error.info is None:
                raise
            return error.info

    def _ensure(self, principal: C, info: KeyInfo) -> None:
        # The present description is asked about, too, and what opens a key to more takes more than the right to make
        # it: or who may make keys could open what lies under another one by relabelling it.
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
        """The keys whose description the principal may read; the others are left out, which is no denial."""
        names = []
        for name in self._store.names():
            with contextlib.suppress(KeyNotFound, KeyRevoked):  # between the two calls
                if self._refusal(principal, Operation.info, self._store.info(name)) is None:
                    names.append(name)
        return names

    def _principal(self, request: dict[str, object], *, operation: str, name: str) -> C:
        token = request.get("token")
        try:
            if not isinstance(token, str) or not token:
                raise Unauthenticated("The request to the key broker carries no token.")
            return self._verify(token)
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
        """Raise AccessDenied, and audit it, unless the policy allows it."""
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
        """Why the policy does not allow it; none if it does."""
        policies: tuple[str, ...] = ()
        try:
            verdict = self._decide(principal, operation, info)
            if verdict.allowed is True:
                return None
            policies = tuple(verdict.policies)
            reason = f"denied by {', '.join(policies)}" if policies else "no policy allows it"
        except AccessDenied as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 (what cannot be decided is denied)
            reason = f"the policy failed with {type(error).__name__}"
        return Denial(
            principal=principal, operation=operation, name=info.name, reason=reason, policies=policies
        )

    def _deny(self, denial: Denial[C]) -> None:
        try:
            self._audit(denial)
        except Exception as error:  # noqa: BLE001 (the denial stands)
            logging.getLogger(__name__).error("A denial could not be recorded: %s.", type(error).__name__)


def widens(old: KeyInfo, new: KeyInfo) -> bool:
    """Whether a key's new description lets it be used by more, or for more: a lower class, or a further purpose."""
    lower = COLUMN_CLASSES.index(new.column_class) < COLUMN_CLASSES.index(old.column_class)
    return lower or (bool(old.purposes) and not (new.purposes and set(new.purposes) <= set(old.purposes)))


def _shown(value: object) -> str:
    """Hostile text, short and printable."""
    return ascii(value)[1:-1][:MAX_AUDITED_CHARS] if isinstance(value, str) else ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest("A wrapped secret is text.")
    return value


def _decoded(value: object) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("A secret travels in base64.") from None
